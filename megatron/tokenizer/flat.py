"""Ids of many texts in two arrays, for callers that would only concatenate lists of Python numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.tokenizer.base import Tokenizer

# More texts at a time make encode_batch no faster, and keep more results of the library in memory.
_BATCH = 128


@dataclass(frozen=True)
class FlatIds:
    """`ids` [sum of lengths], any integer type, one text after the other; `lengths` [texts] in tokens."""

    ids: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]

    def rows(self) -> list[list[int]]:
        """The ids of each text."""
        return [row.tolist() for row in np.split(self.ids, np.cumsum(self.lengths)[:-1])] if len(self.lengths) else []


class FlatEncoder(Protocol):
    """Something that encodes texts into `FlatIds`; raises `TextError` if any of them cannot be encoded."""

    def __call__(self, texts: Sequence[str]) -> FlatIds:
        """Ids of every text."""
        ...


class ListEncoder:
    """The tokenizer's own `encode_batch`, flattened."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> FlatIds:
        """Ids of every text."""
        parts = []
        for start in range(0, len(texts), _BATCH):
            rows = self._tokenizer.encode_batch(texts[start : start + _BATCH])
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            # Each batch becomes an array before the next: lists of Python numbers take ten times the memory.
            parts.append(FlatIds(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths))
        return join(parts)


def join(parts: Sequence[FlatIds]) -> FlatIds:
    """The texts of all parts, in order."""
    if not parts:
        return FlatIds(np.empty(0, np.int32), np.empty(0, np.int64))
    return FlatIds(np.concatenate([part.ids for part in parts]), np.concatenate([part.lengths for part in parts]))


def wrap(flat: FlatIds, before: Sequence[int], after: Sequence[int]) -> FlatIds:
    """The same ids of every text in front of it and behind it."""
    if not before and not after:
        return flat
    lengths = flat.lengths + len(before) + len(after)
    ends = np.cumsum(lengths)
    wrapped = np.empty(int(lengths.sum()), flat.ids.dtype)
    inside = np.ones(len(wrapped), np.bool_)
    places = [(ends - lengths + i, token) for i, token in enumerate(before)]
    places += [(ends - len(after) + i, token) for i, token in enumerate(after)]
    for place, token in places:
        wrapped[place] = token
        inside[place] = False
    wrapped[inside] = flat.ids
    return FlatIds(wrapped, lengths)


def prepend(flat: FlatIds, tokens: npt.NDArray[np.int64], where: npt.NDArray[np.bool_]) -> FlatIds:
    """`tokens` [texts] in front of the texts where `where` [texts] holds."""
    if not where.any():
        return flat
    lengths = flat.lengths + where
    starts = (np.cumsum(lengths) - lengths)[where]
    prepended = np.empty(int(lengths.sum()), flat.ids.dtype)
    inside = np.ones(len(prepended), np.bool_)
    prepended[starts], inside[starts] = tokens[where], False
    prepended[inside] = flat.ids
    return FlatIds(prepended, lengths)


def strip(flat: FlatIds, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> FlatIds:
    """Without the `first` [texts] and `last` [texts] tokens of each text."""
    if not first.any() and not last.any():
        return flat
    place = np.arange(len(flat.ids)) - np.repeat(np.cumsum(flat.lengths) - flat.lengths, flat.lengths)
    inside = (place >= np.repeat(first, flat.lengths)) & (place < np.repeat(flat.lengths - last, flat.lengths))
    return FlatIds(flat.ids[inside], flat.lengths - first - last)


def append(flat: FlatIds, token: int, where: npt.NDArray[np.bool_]) -> FlatIds:
    """`token` behind the texts where `where` [texts] holds."""
    lengths = flat.lengths + where
    ends = np.cumsum(lengths)[where] - 1
    appended = np.empty(int(lengths.sum()), flat.ids.dtype)
    inside = np.ones(len(appended), np.bool_)
    appended[ends], inside[ends] = token, False
    appended[inside] = flat.ids
    return FlatIds(appended, lengths)


def select(flat: FlatIds, kept: npt.NDArray[np.bool_]) -> FlatIds:
    """Only the texts where `kept` [texts] holds."""
    return FlatIds(flat.ids[np.repeat(kept, flat.lengths)], flat.lengths[kept])


def interleave(first: FlatIds, second: FlatIds, is_second: npt.NDArray[np.bool_]) -> FlatIds:
    """Texts of two results in one order: where `is_second` [texts] holds, the next text of `second`."""
    lengths = np.empty(len(is_second), np.int64)
    lengths[~is_second], lengths[is_second] = first.lengths, second.lengths
    ids = np.empty(int(lengths.sum()), np.result_type(first.ids, second.ids))
    from_second = np.repeat(is_second, lengths)
    ids[~from_second], ids[from_second] = first.ids, second.ids
    return FlatIds(ids, lengths)
