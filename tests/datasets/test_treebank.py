"""The sentences: our own are fixed and obey their rule; trees are read whole or refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyro_sparse.datasets import Sentence, load_treebank

TREEBANK = Path(__file__).parents[3] / "shared" / "data" / "sst"
needs_files = pytest.mark.skipif(
    not TREEBANK.is_dir(), reason=f"reads the Stanford Sentiment Treebank, which is not in {TREEBANK}"
)


def test_made_sentences_are_distinct_and_always_the_same() -> None:
    sentences = load_treebank()
    assert len(sentences) == 2400 == len({tuple(sentence.words) for sentence in sentences})
    assert sentences == load_treebank()
    assert " ".join(sentences[1].words) == "the family travels to the valley in winter , and the title is warm ."


def test_made_sentences_obey_the_rule() -> None:
    sentences = load_treebank()
    for words, label, word_labels in sentences:
        assert len(words) == len(word_labels)
        assert label == min(4, max(0, 2 + sum(word_label - 2 for word_label in word_labels)))
    assert {sentence.label for sentence in sentences} == {0, 1, 2, 3, 4}
    # A word of an opinion is one wherever it is, and the adjectives' sign is their own.
    signs: dict[str, set[int]] = {}
    for words, _, word_labels in sentences:
        for word, label in zip(words, word_labels, strict=True):
            signs.setdefault(word, set()).add(label)
    assert {word for word, labels in signs.items() if labels == {1, 3}} == {
        "deeply",
        "really",
        "truly",
        "utterly",
        "very",
    }
    assert {frozenset(labels) for labels in signs.values()} == {frozenset(s) for s in ({1}, {2}, {3}, {1, 3})}


@pytest.mark.parametrize("make", [str, Path])
def test_reads_a_tree_a_line(tmp_path: Path, make: type) -> None:
    path = tmp_path / "trees.txt"
    path.write_text("(3 (2 A) (4 (1 (2 sharp\\/dry) (0 été)) (3 8\xa01/2)))\n(0 no)", encoding="utf-8")
    assert load_treebank(make(path)) == [
        Sentence(["A", "sharp\\/dry", "été", "8\xa01/2"], 3, [2, 2, 0, 3]),
        Sentence(["no"], 0, [0]),
    ]


@pytest.mark.parametrize("left", [True, False])
def test_reads_trees_of_any_depth(tmp_path: Path, left: bool) -> None:
    tree = "(1 a)"
    for _ in range(1999):
        tree = f"(3 {tree} (2 b))" if left else f"(3 (2 b) {tree})"
    (tmp_path / "deep.txt").write_text(tree)
    (sentence,) = load_treebank(tmp_path / "deep.txt")
    assert sentence.label == 3 and len(sentence.words) == 2000 and sentence.word_labels.count(1) == 1


@pytest.mark.parametrize(
    "line",
    [
        "",
        "a",
        "(5 a)",
        "(-1 a)",
        "(2 )",
        "(2 a b)",
        "(2 (2 a))",
        "(2 (2 a) (2 b) (2 c))",
        "(2 (2 a) b)",
        "(2 (2 a) (2 b)",
        "(2 a))",
        "(2 a) (2 b)",
        "((2 a) (2 b))",
        "(2  a)",
        "\0",
        "(2 (2 " + "a" * 80 + ")",
    ],
)
def test_a_line_that_is_no_tree_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trees.txt"
    path.write_text(f"(2 fine)\n{line}\n")
    with pytest.raises(ValueError, match=r"load_treebank, line 2 of .*: expected a tree such as .*, got '") as caught:
        load_treebank(path)
    assert len(str(caught.value)) < 350 + len(str(path))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_treebank(tmp_path / "absent.txt")


@needs_files
@pytest.mark.parametrize(
    ("part", "count", "first"), [("train", 8544, "The Rock"), ("dev", 1101, "It 's"), ("test", 2210, "Effective but")]
)
def test_reads_the_treebank_whole(part: str, count: int, first: str) -> None:
    sentences = load_treebank(TREEBANK / f"{part}.txt")
    assert len(sentences) == count and " ".join(sentences[0].words[:2]) == first
    assert {sentence.label for sentence in sentences} == {0, 1, 2, 3, 4}
    assert all(len(sentence.words) == len(sentence.word_labels) > 0 for sentence in sentences)
