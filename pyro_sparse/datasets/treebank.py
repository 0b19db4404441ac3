r"""Sentences with a sentiment: from a file of the Stanford Sentiment Treebank, or made here by rules."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_LEAF = re.compile(r"\(([0-4]) ([^ ()]+)\)")  # a word may hold a no-break space
_NODE = re.compile(r"\([0-4] \0 \0\)")  # both children read


class Sentence(NamedTuple):
    r"""A sentence with its sentiment: 0 very negative, 1 negative, 2 neutral, 3 positive, 4 very positive.

    Attributes:
        words: as in the file, punctuation marks among them.
        label: the sentiment of the whole.
        word_labels: the sentiment of each word by itself.
    """

    words: list[str]
    label: int
    word_labels: list[int]


def load_treebank(path: str | Path | None = None) -> list[Sentence]:
    r"""
    Sentences whose sentiment, and that of each word, is known.

    Without a path, 2400 sentences about films that we made, always the same ones in the same order. One or two clauses
    of a sentence have an opinion, of :math:`\pm 1` ("dull") or :math:`\pm 2` ("truly dull"). Its label is 2 plus their
    sum, held within 0 and 4; the words labelled other than 2 are those that decide it.

    With a path, the trees of a file, one on each line, nothing left out. A tree is ``(label word)`` or
    ``(label tree tree)``; the labels of the nodes between root and words are not kept.

    Args:
        path: a file in UTF-8, or None.

    Returns:
        The sentences.

    Raises:
        ValueError: for a line that is no such tree, or has a label that is not 0, 1, 2, 3 or 4.

    **Source** of the format: Socher et al., *Recursive deep models for semantic compositionality over a sentiment
    treebank*, EMNLP 2013.
    """
    if path is None:
        return list(_made_sentences())
    with open(path, encoding="utf-8") as lines:
        return [_read(line.rstrip("\n"), f"load_treebank, line {i} of {path}") for i, line in enumerate(lines, start=1)]


def _read(tree: str, where: str) -> Sentence:
    leaves = _LEAF.findall(tree)
    rest, found = _LEAF.sub("\0", tree), 1
    while found:  # a level of the tree at a time, from below
        rest, found = _NODE.subn("\0", rest)
    if rest != "\0" or "\0" in tree:
        shown = tree if len(tree) <= 60 else f"{tree[:60]}..."
        raise ValueError(
            f"{where}: expected a tree such as '(3 (2 a) (4 joy))', got '{shown}'. "
            "A node is a label from 0 to 4 and either a word or two nodes, in brackets; one tree on a line."
        )
    return Sentence([word for _, word in leaves], int(tree[1]), [int(label) for label, _ in leaves])


_GOOD = "charming clever fresh funny gripping lovely moving rich sharp sincere strong vivid warm wise witty".split()
_BAD = "bland clumsy dull empty flat hollow lifeless messy noisy pale shallow slow stale tired weak".split()
_INTENSIFIERS = "deeply really truly utterly very".split()
_ASPECTS = "acting camera cast dialogue direction ending humor music pace photography plot script story title".split()
_HEROES = "boy couple doctor driver family girl nurse painter sailor singer soldier teacher widow writer".split()
_DEEDS = "comes meets moves returns runs travels walks writes".split()
_PLACES = "bridge city coast farm harbor house island school station town valley village".split()
_TIMES = "again|at last|every night|for a year|in 1950|in winter|once more|one day".split("|")


def _made_sentences(count: int = 2400) -> Iterator[Sentence]:
    # Of Python's generators only random() is the same in every version.
    uniform = random.Random(0).random

    def pick(options: Sequence[str]) -> str:
        return options[int(uniform() * len(options))]

    for _ in range(count):
        clauses = [_opinion(pick, uniform) for _ in range(1 + (uniform() < 0.5))]
        clauses += [_neutral(pick) for _ in range(1 + (uniform() < 0.5))]
        clauses.sort(key=lambda _: uniform())
        words, labels = ["the"], [2]
        for i, clause in enumerate(clauses):
            if i:
                words += [",", pick(["and", "while"]), "the"]
                labels += [2, 2, 2]
            words += [word for word, _ in clause]
            labels += [label for _, label in clause]
        total = sum(label - 2 for clause in clauses for _, label in clause)
        yield Sentence([*words, "."], 2 + max(-2, min(2, total)), [*labels, 2])


Clause = list[tuple[str, int]]  # words with labels; "the" goes before it


def _opinion(pick: Callable[[Sequence[str]], str], uniform: Callable[[], float]) -> Clause:
    label, adjectives = (3, _GOOD) if uniform() < 0.5 else (1, _BAD)
    intensifier = [(pick(_INTENSIFIERS), label)] if uniform() < 0.5 else []
    return [(pick(_ASPECTS), 2), ("is", 2), *intensifier, (pick(adjectives), label)]


def _neutral(pick: Callable[[Sequence[str]], str]) -> Clause:
    words = [pick(_HEROES), pick(_DEEDS), "to", "the", pick(_PLACES), *pick(_TIMES).split()]
    return [(word, 2) for word in words]
