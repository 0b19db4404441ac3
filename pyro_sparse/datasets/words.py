r"""Inflected words: from a file of the SIGMORPHON shared tasks, or made here by rules. Neither needs a network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

# The endings of Spanish's regular verbs (without vos): those of -ar, those that -er and -ir share, and their own.
_AR = """
ar ando ado o as a amos áis an aba abas ábamos abais aban é aste ó asteis aron aré arás ará aremos aréis arán aría
arías aríamos aríais arían e es emos éis en ara aras áramos arais aran ase ases ásemos aseis asen are ares áremos areis
aren ad
"""
_ER_IR = """
iendo ido o es e en ía ías íamos íais ían í iste ió imos isteis ieron a as amos áis an iera ieras iéramos ierais ieran
iese ieses iésemos ieseis iesen iere ieres iéremos iereis ieren
"""
_ER = "er emos éis eré erás erá eremos eréis erán ería erías eríamos eríais erían ed"
_IR = "ir ís iré irás irá iremos iréis irán iría irías iríamos iríais irían id"
_ENDINGS = {"ar": _AR.split(), "er": (_ER_IR + _ER).split(), "ir": (_ER_IR + _IR).split()}

# A stem is a prefix, an onset and a rime; the rime decides the class. No stem ends in a letter whose spelling changes
# before e or i.
_PREFIXES = ("", "re")
_ONSETS = ("b", "d", "f", "l", "m", "tr")
_CLASSES = {"ant": "ar", "ort": "ar", "il": "ar", "ond": "er", "eb": "er", "urr": "ir"}


def load_words(path: str | Path | None = None, *, column: int = 2) -> list[str]:
    r"""
    A list of inflected words.

    Without a path, 3696 verb forms that we made: the 51 or 52 regular forms of each of 72 verbs that sound Spanish and
    mostly are not. They are always the same ones in the same order, verb by verb.

    With a path, one column of a tab-separated file, line by line, nothing left out. In the files of SIGMORPHON 2016
    a line is lemma, features, form (``column=2``); in those of CoNLL–SIGMORPHON 2018 it is lemma, form, features
    (``column=1``).

    Args:
        path: a file in UTF-8, or None.
        column: which column holds the words, counted from 0.

    Returns:
        The words.

    Raises:
        ValueError: if a line has no such column, or holds no word but features there (``=`` or ``;``) or nothing.

    **Source** of the format: Cotterell et al., *The SIGMORPHON 2016 shared task: morphological reinflection*;
    Cotterell et al., *The CoNLL–SIGMORPHON 2018 shared task: universal morphological reinflection*.
    """
    if path is None:
        return list(_made_words())
    with open(path, encoding="utf-8") as lines:
        return [
            _word(line.rstrip("\n").split("\t"), column, f"load_words, line {i} of {path}")
            for i, line in enumerate(lines, start=1)
        ]


def _word(fields: list[str], column: int, where: str) -> str:
    if not 0 <= column < len(fields):
        raise ValueError(
            f"{where}: expected a column {column}, got {len(fields)} columns. "
            "Columns are separated by tabs and counted from 0."
        )
    word = fields[column]
    if not word or "=" in word or ";" in word:
        raise ValueError(
            f"{where}: expected a word in column {column}, got '{word}'. "
            "Use column=2 for files of SIGMORPHON 2016 and column=1 for those of 2018."
        )
    return word


def _made_words() -> Iterator[str]:
    for prefix, onset, (rime, verb_class) in product(_PREFIXES, _ONSETS, _CLASSES.items()):
        for ending in _ENDINGS[verb_class]:
            yield prefix + onset + rime + ending
