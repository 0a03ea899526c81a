"""Which characters libraries with tables of different versions of Unicode may take for different things."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_CODES = 0x110000
_PLANES_WITH_LETTERS = 0x40000
# The basic plane, and the emoji that occur in ordinary text.
_LOOKED_AT = (range(0xD800), range(0xE000, 0x10000), range(0x1F300, 0x1FB00))
# Vowels and final consonants that join the Korean letter before them; no table lists these pairs.
_JOINING_JAMO = frozenset([*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)])


def finder(doubtful: npt.NDArray[np.bool_]) -> Callable[[str], bool]:
    """Whether a text has a character for which `doubtful` [0x110000] holds. ASCII must not be doubtful."""

    def find(text: str) -> bool:
        # A regular expression over such sets is a hundred times slower.
        if text.isascii():
            return False
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        return bool(doubtful[codes].any())

    return find


def unknown() -> npt.NDArray[np.bool_]:
    """Characters that this Python does not know, which newer tables may call letters.

    The tables of the libraries are newer than those of every Python that is supported. Beyond the planes that have
    letters, everything counts as unknown.
    """
    doubtful = np.ones(_CODES, np.bool_)
    doubtful[:_PLANES_WITH_LETTERS] = [unicodedata.category(chr(code)) == "Cn" for code in range(_PLANES_WITH_LETTERS)]
    return doubtful


def changeable() -> npt.NDArray[np.bool_]:
    """Characters that a text in normalization form C may lack, and those that are unknown or not looked at here.

    A text none of whose characters combines with the one before, or is replaced on its own, is in form C. Characters
    that have been assigned keep these properties in all later versions, and earlier ones leave unknown ones alone.
    """
    codes = [code for part in _LOOKED_AT for code in part]
    seconds = {part[1] for code in codes if len(part := _canonical(code)) > 1} | _JOINING_JAMO
    doubtful = np.ones(_CODES, np.bool_)
    doubtful[[code for code in codes if _is_inert(code) and code not in seconds]] = False
    return doubtful


def _canonical(code: int) -> list[int]:
    """What a character is canonically made of."""
    parts = unicodedata.decomposition(chr(code)).split()
    return [] if not parts or parts[0].startswith("<") else [int(part, 16) for part in parts]


def _is_inert(code: int) -> bool:
    character = chr(code)
    known = unicodedata.category(character) not in ("Cn", "Cs")
    return known and not unicodedata.combining(character) and unicodedata.is_normalized("NFC", character)
