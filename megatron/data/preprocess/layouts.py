"""How encoded documents become datasets: plain, AscendSpeed's three files, or one file of prompts and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.preprocess.documents import Handler
from megatron.tokenizer.flat import FlatIds, append

Form = Literal["packed", "compact"]
IGNORED = -100
PACKED = ("input_ids", "attention_mask", "labels")
COMPACT = "dialogue_document"


@dataclass(frozen=True)
class Documents:
    """Documents of one dataset: `tokens` [sum of lengths], `lengths` [sequences], `counts` [documents] in sequences."""

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


Columns = dict[str, Documents]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Encoded documents of one column.

    Attributes:
        flat: ids of every segment, markers included.
        counts: [documents] segments of each.
        trained: [segments] whether the model learns them.
        ends: [segments] whether the label of the marker is EOD.
        marked: [segments] whether there is a marker.
        eod: appended to every document; None for none.
    """

    flat: FlatIds
    counts: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.bool_]
    marked: npt.NDArray[np.bool_]
    eod: int | None

    def last(self) -> npt.NDArray[np.bool_]:
        """[segments]: whether a document ends there."""
        last = np.zeros(len(self.trained), np.bool_)
        last[np.cumsum(self.counts)[self.counts > 0] - 1] = True
        return last

    def ended(self) -> FlatIds:
        """The ids with EOD."""
        return self.flat if self.eod is None else append(self.flat, self.eod, self.last())


class Layout(Protocol):
    """What is written: `names` are the ends of the prefixes, `dtypes` their token types, `width` columns are read."""

    names: tuple[str, ...]
    dtypes: tuple[np.dtype[Any], ...]
    width: int

    def __call__(self, columns: list[Finished]) -> Columns:
        """The datasets of a chunk by name."""
        ...


def build_layout(handler: Handler, form: Form, dtype: np.dtype[Any], eod: int) -> Layout:
    """The layout for what a handler makes."""
    if handler.columns is not None:
        return _Plain(handler.columns, dtype)
    if form == "packed":
        return _Packed(eod)
    if handler.needs_packed:
        raise DataError("--instruction-format compact cannot hold the labels of this handler; take packed")
    return _Compact(dtype)


class _Plain:
    def __init__(self, columns: tuple[str, ...], dtype: np.dtype[Any]) -> None:
        self.names = columns
        self.dtypes = (dtype,) * len(columns)
        self.width = len(columns)

    def __call__(self, columns: list[Finished]) -> Columns:
        return {name: self._one(column) for name, column in zip(self.names, columns, strict=True)}

    def _one(self, column: Finished) -> Documents:
        flat = column.ended()
        return Documents(flat.ids.astype(self.dtypes[0]), flat.lengths, column.counts)


class _Packed:
    """Three int32 datasets of equal lengths, one sequence per document; prompts are -100 in the labels."""

    names = tuple(f"packed_{part}_document" for part in PACKED)
    dtypes = (np.dtype("<i4"),) * 3
    width = 1

    def __init__(self, eod: int) -> None:
        self._eod = eod

    def __call__(self, columns: list[Finished]) -> Columns:
        (column,) = columns
        flat = column.ended()
        ids = flat.ids.astype("<i4")
        labels = np.where(np.repeat(column.trained, flat.lengths), ids, np.int32(IGNORED))
        starts = np.cumsum(flat.lengths) - flat.lengths
        labels[starts[column.marked]] = np.where(column.ends[column.marked], self._eod, IGNORED)
        if column.eod is not None:
            labels[np.cumsum(flat.lengths)[column.last()] - 1] = column.eod
        segment_ends = np.concatenate(([0], np.cumsum(flat.lengths)))
        document_ends = segment_ends[np.cumsum(column.counts)]
        lengths = np.diff(np.concatenate(([0], document_ends)))
        counts = np.ones(len(lengths), np.int64)
        parts = (ids, np.ones(len(ids), np.int32), labels.astype("<i4"))
        return {name: Documents(part, lengths, counts) for name, part in zip(self.names, parts, strict=True)}


class _Compact:
    """One dataset: the sequences of a document are in turn a prompt (maybe empty) and an answer."""

    names = (COMPACT,)
    width = 1

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtypes = (dtype,)

    def __call__(self, columns: list[Finished]) -> Columns:
        (column,) = columns
        flat = column.ended()
        documents = np.repeat(np.arange(len(column.counts)), column.counts)
        # Segments of one kind that follow each other are one run; a document that starts with an answer gets an empty
        # prompt, so that the kinds alternate from a prompt on.
        starts_run = np.ones(len(documents), np.bool_)
        starts_run[1:] = (documents[1:] != documents[:-1]) | (column.trained[1:] != column.trained[:-1])
        runs = np.cumsum(starts_run) - 1
        lengths = np.bincount(runs, flat.lengths).astype(np.int64)
        owners, trained = documents[starts_run], column.trained[starts_run]
        opens = np.ones(len(owners), np.bool_)
        opens[1:] = owners[1:] != owners[:-1]
        empty = np.flatnonzero(opens & trained)
        lengths = np.insert(lengths, empty, 0)
        counts = np.bincount(owners, minlength=len(column.counts)) + np.bincount(
            owners[empty], minlength=len(column.counts)
        )
        return {COMPACT: Documents(flat.ids.astype(self.dtypes[0]), lengths, counts.astype(np.int64))}
