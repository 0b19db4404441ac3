"""The words: our own list is fixed and regular; files of both SIGMORPHON formats are read whole or refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyro_sparse.datasets import load_words

MORPHOLOGY = Path(__file__).parents[3] / "shared" / "data" / "morphology"
needs_files = pytest.mark.skipif(
    not MORPHOLOGY.is_dir(), reason=f"reads the SIGMORPHON files, which are not in {MORPHOLOGY}"
)


def test_made_words_are_distinct_and_always_the_same() -> None:
    words = load_words()
    assert len(words) == len(set(words)) == 3696
    assert words == load_words() and words is not load_words()
    assert words[:3] == ["bantar", "bantando", "bantado"] and words[-1] == "retrurrid"
    assert set("".join(words)) == set("abdefilmnorstuáéíó")


@pytest.mark.parametrize(
    ("stem", "forms"),
    [
        ("bant", "bantar banto bantáis bantábamos bantaste bantaré bantaríamos bantemos bantásemos bantad"),
        ("febond", None),
        ("fond", "fonder fondiendo fondo fondéis fondía fondió fonderé fonderíais fondan fondiéramos fonded"),
        ("relurr", "relurrir relurrimos relurrís relurría relurriré relurriríais relurran relurriesen relurrid"),
    ],
)
def test_made_words_have_the_regular_endings(stem: str, forms: str | None) -> None:
    found = {word for word in load_words() if word.startswith(stem)}
    assert not found if forms is None else set(forms.split()) <= found


@pytest.mark.parametrize("make", [str, Path])
def test_reads_a_column_line_by_line(tmp_path: Path, make: type) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("ábaco\tpos=N,num=PL\tábacos\nir\tpos=V\tfuéramos\nir\tpos=V\tfuéramos\n", encoding="utf-8")
    assert load_words(make(path)) == ["ábacos", "fuéramos", "fuéramos"]
    assert load_words(make(path), column=0) == ["ábaco", "ir", "ir"]


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        (
            "ir\tfuéramos\tV;SBJV",
            2,
            r"line 2 of .*: expected a word in column 2, got 'V;SBJV'\. Use column=2 for .* 2016",
        ),
        ("ir\tpos=V\tfuéramos", 1, r"line 2 of .*: expected a word in column 1, got 'pos=V'"),
        ("ir\tpos=V\t", 2, r"line 2 of .*: expected a word in column 2, got ''"),
        ("ir\tpos=V", 2, r"line 2 of .*: expected a column 2, got 2 columns"),
        ("", 2, r"line 2 of .*: expected a column 2, got 1 columns"),
        ("ir\tpos=V\tfuéramos", -1, r"line [12] of .*: expected a column -1, got 3 columns"),
    ],
)
def test_a_line_without_a_word_is_an_error(tmp_path: Path, line: str, column: int, message: str) -> None:
    path = tmp_path / "words.tsv"
    path.write_text(f"a\tb\tc\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"load_words, {message}"):
        load_words(path, column=column)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_words(tmp_path / "absent.tsv")


@needs_files
@pytest.mark.parametrize(
    ("name", "column", "count", "first"),
    [
        ("spanish2016-train", 2, 12575, "ababoles"),
        ("spanish2016-dev", 2, 1596, "aarónicos"),
        ("spanish2016-test", 2, 23229, "gobernabais"),
        ("turkish-test", 1, 1000, "peynirli pastalarınızı"),
    ],
)
def test_reads_the_shared_task_files_whole(name: str, column: int, count: int, first: str) -> None:
    words = load_words(MORPHOLOGY / f"{name}.tsv", column=column)
    assert len(words) == count and words[0] == first
