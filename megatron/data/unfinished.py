"""A `.bin/.idx` pair that is written over several lives of a process.

Beside the target lie `.bin.unfinished` (tokens), `.lengths.unfinished` (int32 per sequence) and `.counts.unfinished`
(int32 sequences per document). They only grow. `mark` makes them safe and says how far they go; after a kill, `resume`
cuts them back to a mark. `publish` gives the pair its names; a kill within it is made good by calling it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_file import write_index
from megatron.data.indexed_dataset import bin_path, idx_path
from megatron.data.indexed_writer import sync, sync_folder

_LONGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How far an unfinished pair goes."""

    tokens: int
    sequences: int
    documents: int


class UnfinishedDataset:
    """Appends documents.

    Args:
        prefix: path without `.bin` and `.idx`; its folder must exist.
        dtype: type of the tokens, see `index_file.token_dtype`.
        mark: where to go on; None starts with nothing.

    Raises:
        DataError: the files do not reach as far as the mark.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, mark: Mark | None = None) -> None:
        self.prefix = str(prefix)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.parts = {name: Path(f"{prefix}.{name}.unfinished") for name in ("bin", "lengths", "counts")}
        start = mark or Mark(tokens=0, sequences=0, documents=0)
        self._tokens, self._sequences, self._documents = start.tokens, start.sequences, start.documents
        sizes = (start.tokens * self.dtype.itemsize, start.sequences * 4, start.documents * 4)
        self._files = [
            _reopen(path, size, fresh=mark is None) for path, size in zip(self.parts.values(), sizes, strict=True)
        ]

    def add(
        self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> None:
        """Append documents.

        Args:
            tokens: [sum of lengths], in the type of the pair.
            lengths: [sequences] tokens of each.
            counts: [documents] sequences of each.

        Raises:
            DataError: another type of tokens, or a sequence has 2**31 tokens or more.
        """
        if tokens.dtype != self.dtype:
            raise DataError(f"{tokens.dtype} tokens for {self.prefix}, which holds {self.dtype}.")
        if len(lengths) and lengths.max() > _LONGEST:
            raise DataError(
                f"A sequence of {lengths.max()} tokens does not fit the format, which counts them with 32 bits."
            )
        for file, array in zip(self._files, (tokens, lengths.astype("<i4"), counts.astype("<i4")), strict=True):
            file.write(np.ascontiguousarray(array).data)
        self._tokens += len(tokens)
        self._sequences += len(lengths)
        self._documents += len(counts)

    def mark(self) -> Mark:
        """Bring everything to the disk, and how far it goes."""
        for file in self._files:
            sync(file)
        return Mark(tokens=self._tokens, sequences=self._sequences, documents=self._documents)

    def close(self) -> None:
        """Leave the files for another life."""
        for file in self._files:
            file.close()


def publish(prefix: str | Path, dtype: npt.DTypeLike, mark: Mark) -> None:
    """Give a complete pair its names, `.bin` first: a reader that finds the `.idx` finds its `.bin` too."""
    parts = {name: Path(f"{prefix}.{name}.unfinished") for name in ("bin", "lengths", "counts")}
    if parts["bin"].exists():
        parts["bin"].replace(bin_path(prefix))
    if parts["lengths"].exists() and parts["counts"].exists():
        index = Path(f"{prefix}.idx.unfinished")
        with index.open("wb") as file:
            lengths = _mapped(parts["lengths"], mark.sequences)
            documents = np.zeros(mark.documents + 1, np.int64)
            np.cumsum(_mapped(parts["counts"], mark.documents), out=documents[1:])
            write_index(file, np.dtype(dtype), lengths, documents)
            sync(file)
        index.replace(idx_path(prefix))
        sync_folder(Path(prefix).parent)
    for name in ("lengths", "counts"):
        parts[name].unlink(missing_ok=True)


def leftovers(prefix: str | Path) -> Iterator[Path]:
    """Files that an earlier life left beside a prefix."""
    for name in ("bin", "lengths", "counts", "idx"):
        path = Path(f"{prefix}.{name}.unfinished")
        if path.exists():
            yield path


def _reopen(path: Path, size: int, *, fresh: bool) -> BinaryIO:
    if fresh:
        return path.open("wb")
    if not path.exists() or path.stat().st_size < size:
        raise DataError(f"{path} is missing or shorter than the {size} bytes that were written.")
    os.truncate(path, size)
    return path.open("ab")


def _mapped(path: Path, length: int) -> npt.NDArray[np.int32]:
    return np.memmap(path, "<i4", "r", shape=(length,)) if length else np.empty(0, np.int32)
