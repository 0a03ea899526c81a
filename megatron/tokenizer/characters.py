"""Which characters libraries with tables of different versions of Unicode may take for different things."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# The basic plane, and the emoji that occur in ordinary text.
_LOOKED_AT = (range(0xD800), range(0xE000, 0x10000), range(0x1F300, 0x1FB00))
# Vowels and final consonants that join the Korean letter before them; no table lists these pairs.
_JOINING_JAMO = frozenset([*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)])


_PLANES_WITH_LETTERS = 0x40000


def unknown() -> re.Pattern[str]:
    """Matches texts with a character that this Python does not know, which newer tables may call a letter.

    The tables of the libraries are newer than those of every Python that is supported. Beyond the planes that have
    letters, everything counts as unknown.
    """
    codes = [code for code in range(_PLANES_WITH_LETTERS) if unicodedata.category(chr(code)) == "Cn"]
    return re.compile(f"[{''.join(_ranges([*codes, *range(_PLANES_WITH_LETTERS, 0x110000)]))}]")


def changeable() -> re.Pattern[str]:
    """Matches texts that may not be in normalization form C, or hold a character outside of what is looked at here.

    A text none of whose characters combines with the one before, or is replaced on its own, is in form C. Characters
    that have been assigned keep these properties in all later versions, and earlier ones leave unknown ones alone.
    """
    seconds = {part[1] for code in _codes() if (part := _canonical(code)) and len(part) > 1} | _JOINING_JAMO
    safe = [code for code in _codes() if _is_inert(code) and code not in seconds]
    return re.compile(f"[^{''.join(_ranges(safe))}]")


def _codes() -> Iterator[int]:
    for part in _LOOKED_AT:
        yield from part


def _canonical(code: int) -> list[int]:
    """What a character is canonically made of."""
    parts = unicodedata.decomposition(chr(code)).split()
    return [] if not parts or parts[0].startswith("<") else [int(part, 16) for part in parts]


def _is_inert(code: int) -> bool:
    character = chr(code)
    known = unicodedata.category(character) not in ("Cn", "Cs")
    return known and not unicodedata.combining(character) and unicodedata.is_normalized("NFC", character)


def _ranges(codes: list[int]) -> Iterator[str]:
    """Parts of a character class for ascending codes."""
    start = end = codes[0]
    for code in [*codes[1:], -1]:
        if code != end + 1:
            yield f"{re.escape(chr(start))}-{re.escape(chr(end))}"
            start = code
        end = code
