r"""Inflected words with their lemmas and tags: from a file of a SIGMORPHON task, or made here by rules."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple


class Inflection(NamedTuple):
    r"""One inflected word.

    Attributes:
        lemma: the form that a dictionary has.
        form: the inflected form.
        tags: what the form expresses, such as ``("N", "ABL", "PL", "PSS3S")``.
    """

    lemma: str
    form: str
    tags: tuple[str, ...]


# The nouns of Turkish: a stem, then number, possessor and case. A vowel of a suffix agrees with the vowel before it: A
# stands for its open partner and I for its close one.
_HARMONY = {"a": "aı", "ı": "aı", "o": "au", "u": "au", "e": "ei", "i": "ei", "ö": "eü", "ü": "eü"}
_STEMS = ("b_l", "d_n", "s_z", "y_r", "k_l_m", "m_r_n", "s_v_r", "t_d_l")  # a stem has one vowel, once or twice
_NUMBERS = {"SG": "", "PL": "lAr"}
_POSSESSORS = {"": "", "PSS1S": "Im", "PSS2S": "In", "PSS3S": "I", "PSS1P": "ImIz", "PSS2P": "InIz", "PSS3P": "lArI"}
_CASES = {"NOM": "", "ACC": "I", "GEN": "In", "DAT": "A", "LOC": "dA", "ABL": "dAn"}


def load_morphology(path: str | Path | None = None) -> list[Inflection]:
    r"""
    A list of inflected words with their lemmas and tags.

    Without a path, 5376 nouns that we made: the 84 forms, by the rules of Turkish, of each of 64 stems that may or may
    not exist, two numbers by six possessors or none by six cases. They are always the same ones in the same order,
    stem by stem. As in Turkish, some forms are ambiguous: *bulları* is the accusative of *bullar*, and her *bullar*,
    and their *bul*, one or many.

    With a path, a tab-separated file of the CoNLL–SIGMORPHON 2018 shared task, line by line, nothing left out. A line
    is lemma, form, and tags separated by ``;``.

    Args:
        path: a file in UTF-8, or None.

    Returns:
        The words, as tuples ``(lemma, form, tags)``.

    Raises:
        ValueError: if a line has not three columns, if one of them is empty, or if the form is a list of tags, as in
            the files of 2016, where a line is lemma, tags, form.

    **Source** of the format: Cotterell et al., *The CoNLL–SIGMORPHON 2018 shared task: universal morphological
    reinflection*.
    """
    if path is None:
        return list(_made_nouns())
    with open(path, encoding="utf-8") as lines:
        return [
            _inflection(line.rstrip("\n").split("\t"), f"load_morphology, line {i} of {path}")
            for i, line in enumerate(lines, start=1)
        ]


def _inflection(fields: list[str], where: str) -> Inflection:
    if len(fields) != 3 or not all(fields):
        raise ValueError(
            f"{where}: expected lemma, form and tags, got {fields}. There are three columns, separated by tabs."
        )
    lemma, form, tags = fields
    if "=" in form or ";" in form:
        raise ValueError(
            f"{where}: expected a form in the second column, got '{form}'. "
            "Files are as those of CoNLL–SIGMORPHON 2018: lemma, form, tags."
        )
    return Inflection(lemma, form, tuple(tags.split(";")))


def _made_nouns() -> Iterator[Inflection]:
    for stem, vowel in product(_STEMS, _HARMONY):
        lemma = stem.replace("_", vowel)
        for number, possessor, case in product(_NUMBERS, _POSSESSORS, _CASES):
            plural = _NUMBERS[number] if possessor != "PSS3P" else ""  # -lAr is not said twice
            owned = plural + _POSSESSORS[possessor]
            link = "n" if owned.endswith("I") and _CASES[case] else ""
            tags = tuple(tag for tag in ("N", case, number, possessor) if tag)
            yield Inflection(lemma, lemma + _harmonize(owned + link + _CASES[case], vowel), tags)


def _harmonize(suffixes: str, vowel: str) -> str:
    """Each A and I made a vowel that agrees with the one before it."""
    letters = []
    for letter in suffixes:
        if letter in "AI":
            letter = vowel = _HARMONY[vowel]["AI".index(letter)]
        letters.append(letter)
    return "".join(letters)
