"""Copies of corpora: parts of them, or with tokens of another width."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data.blend import parse_split, split_range
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.unfinished import UnfinishedDataset, leftovers, publish

# Tokens that are copied at a time.
_PIECE = 1 << 22


def copy_documents(
    source: IndexedDataset, first: int, last: int, output: str | Path, dtype: npt.DTypeLike | None = None
) -> None:
    """Write documents [first, last) of a corpus as another one.

    Args:
        source: the corpus.
        first, last: document numbers.
        output: prefix of the copy; appears complete or not at all.
        dtype: type of its tokens; None keeps that of the corpus.

    Raises:
        DataError: a token does not fit the type, or the output is the corpus itself.
    """
    if Path(output).resolve() == Path(source.prefix).resolve():
        raise DataError(f"The output {output} is the input; choose another --output-prefix.")
    wanted: np.dtype[np.generic] = np.dtype(dtype or source.dtype)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    writer = UnfinishedDataset(output, wanted)
    try:
        for begin, end in _pieces(source, first, last):
            sequences = slice(int(source.index.documents[begin]), int(source.index.documents[end]))
            lengths = source.lengths[sequences].astype(np.int64)
            tokens = source.read(sequences.start, 0, int(lengths.sum())) if len(lengths) else np.empty(0, source.dtype)
            writer.add(
                _narrowed(tokens, wanted, source.prefix), lengths, np.diff(source.index.documents[begin : end + 1])
            )
        mark = writer.mark()
        writer.close()
        publish(output, wanted, mark)
    finally:
        writer.close()
        for path in leftovers(output):
            path.unlink()


def _pieces(source: IndexedDataset, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about `_PIECE` tokens."""
    totals = np.concatenate(([0], np.cumsum(source.lengths, dtype=np.int64)))[source.index.documents]
    begin = first
    while begin < last:
        end = min(last, max(begin + 1, int(np.searchsorted(totals, totals[begin] + _PIECE, "right")) - 1))
        yield begin, end
        begin = end


def _narrowed(tokens: npt.NDArray[np.generic], dtype: np.dtype[np.generic], prefix: str) -> npt.NDArray[np.integer]:
    limits = np.iinfo(dtype)
    if len(tokens) and (int(tokens.max()) > limits.max or int(tokens.min()) < limits.min):
        wrong = int(tokens.max()) if int(tokens.max()) > limits.max else int(tokens.min())
        raise DataError(f"{prefix} holds token id {wrong}, which does not fit {dtype}.")
    return tokens.astype(dtype)


def split_bounds(documents: int, *, parts: int | None, split: str | None) -> list[tuple[str, int, int]]:
    """Name and documents [first, last) of each part.

    Args:
        documents: of the corpus.
        parts: that many parts of equal numbers of documents; or
        split: proportions of train, valid and test, cut where training with --split would cut.

    Raises:
        DataError: more parts than documents.
    """
    if split is not None:
        ranges = [None if part is None else split_range(part, documents) for part in parse_split(split)]
        return [(name, *found) for name, found in zip(("train", "valid", "test"), ranges, strict=True) if found]
    number = 1 if parts is None else parts
    if not 1 <= number <= documents:
        raise DataError(f"--parts {number}: the corpus has {documents} documents, so 1 to {documents} parts")
    bounds = [round(documents * i / number) for i in range(number + 1)]
    return [(str(i), begin, end) for i, (begin, end) in enumerate(pairwise(bounds))]
