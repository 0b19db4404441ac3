"""The inflected words: our own nouns follow the rules of Turkish; files of CoNLL–SIGMORPHON 2018 are read whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyro_sparse.datasets import Inflection, load_morphology

MORPHOLOGY = Path(__file__).parents[3] / "shared" / "data" / "morphology"
needs_files = pytest.mark.skipif(
    not MORPHOLOGY.is_dir(), reason=f"reads the SIGMORPHON files, which are not in {MORPHOLOGY}"
)


def test_made_nouns_are_always_the_same_and_no_two_alike() -> None:
    nouns = load_morphology()
    assert len(nouns) == len(set(nouns)) == 64 * 84
    assert nouns == load_morphology() and nouns is not load_morphology()
    assert nouns[0] == Inflection("bal", "bal", ("N", "NOM", "SG"))
    assert nouns[-1] == ("tüdül", "tüdüllerinden", ("N", "ABL", "PL", "PSS3P"))
    assert len({noun.lemma for noun in nouns}) == 64
    assert len({noun.tags for noun in nouns}) == 84


@pytest.mark.parametrize(
    ("lemma", "tags", "form"),
    [
        ("kılım", "N ABL PL PSS3S", "kılımlarından"),
        ("söz", "N LOC SG PSS1P", "sözümüzde"),
        ("söz", "N ACC PL PSS1S", "sözlerimi"),
        ("yol", "N DAT SG", None),
        ("bul", "N NOM SG PSS2P", "bulunuz"),
        ("bul", "N ACC PL", "bulları"),
        ("bul", "N NOM PL PSS3S", "bulları"),
        ("bul", "N NOM SG PSS3P", "bulları"),
        ("bul", "N NOM PL PSS3P", "bulları"),
        ("sever", "N GEN SG PSS3S", "severinin"),
    ],
)
def test_made_nouns_follow_the_rules(lemma: str, tags: str, form: str | None) -> None:
    forms = [noun.form for noun in load_morphology() if noun.lemma == lemma and noun.tags == tuple(tags.split())]
    assert forms == ([] if form is None else [form])


@pytest.mark.parametrize("make", [str, Path])
def test_reads_line_by_line(tmp_path: Path, make: type) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("su\tsuyum\tN;NOM;SG;PSS1S\nboş mu\tboş mu?\tADJ\nboş mu\tboş mu?\tADJ\n", encoding="utf-8")
    line = Inflection("boş mu", "boş mu?", ("ADJ",))
    assert load_morphology(make(path)) == [Inflection("su", "suyum", ("N", "NOM", "SG", "PSS1S")), line, line]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("su\tsuyum", r"lemma, form and tags, got \['su', 'suyum'\]"),
        ("su\tsuyum\t", r"lemma, form and tags, got \['su', 'suyum', ''\]"),
        ("su\tsuyum\tN\tPL", r"lemma, form and tags, got \['su', 'suyum', 'N', 'PL'\]"),
        ("", r"lemma, form and tags, got \[''\]"),
        ("su\tpos=N,num=SG\tsuyum", r"a form in the second column, got 'pos=N,num=SG'\. Files are as .* 2018"),
        ("su\tN;SG\tsuyum", r"a form in the second column, got 'N;SG'"),
    ],
)
def test_a_line_of_another_format_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "words.tsv"
    path.write_text(f"su\tsuyum\tN\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"load_morphology, line 2 of .*: expected {message}"):
        load_morphology(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_morphology(tmp_path / "absent.tsv")


@needs_files
@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("turkish-train-high", 10000, ("otuz birci", "otuz bircimiz", ("N", "NOM", "SG", "PSS1P"))),
        ("turkish-test", 1000, ("peynirli pasta", "peynirli pastalarınızı", ("N", "ACC", "PL", "PSS2P"))),
    ],
)
def test_reads_the_shared_task_files_whole(name: str, count: int, first: tuple[str, str, tuple[str, ...]]) -> None:
    words = load_morphology(MORPHOLOGY / f"{name}.tsv")
    assert len(words) == count and words[0] == first
