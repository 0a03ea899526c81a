"""Writer of `.bin/.idx` pairs, and joining of several into one."""

from __future__ import annotations

import os
import shutil
import uuid
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_file import read_index, write_index
from megatron.data.indexed_dataset import IndexedDataset, bin_path, idx_path


class IndexedDatasetWriter:
    """Writes a corpus so that it appears complete or not at all.

    Everything goes to temporary names beside the target; `close` syncs and renames them, `.bin` first: a reader that
    finds the new `.idx` finds its `.bin` too. Used as a context manager, an exception leaves nothing behind.

    Args:
        prefix: path without `.bin` and `.idx`; its folder must exist.
        dtype: type of the tokens, see `index_file.token_dtype`.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._limits = np.iinfo(self.dtype)
        self._lengths = array("i")
        self._documents = array("q", [0])
        suffix = f"{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        self._temporary_bin = bin_path(f"{prefix}.{suffix}")
        self._temporary_idx = idx_path(f"{prefix}.{suffix}")
        self._file = self._temporary_bin.open("xb")

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """Append one sequence to the document that is being written; `end_document` ends it.

        Raises:
            DataError: a token does not fit the type, or the sequence has 2**31 tokens or more.
        """
        values = self._converted(tokens)
        self._append_length(len(values))
        self._file.write(values.tobytes())

    def end_document(self) -> None:
        """The sequences added since the last end form one document."""
        self._documents.append(len(self._lengths))

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append a whole document: all its tokens [n], and the lengths of its sequences (one sequence by default).

        Raises:
            DataError: the lengths do not sum to the number of tokens, or a token does not fit the type.
        """
        values = self._converted(tokens)
        lengths = [len(values)] if lengths is None else lengths
        if sum(lengths) != len(values) or any(length < 0 for length in lengths):
            raise DataError(
                f"Sequence lengths {list(lengths)[:8]} do not divide the {len(values)} tokens of a document."
            )
        for length in lengths:
            self._append_length(length)
        self._file.write(values.tobytes())
        self.end_document()

    def add_dataset(self, prefix: str | Path) -> None:
        """Append all documents of another corpus of the same token type.

        Raises:
            DataError: the corpus is damaged or of another token type.
        """
        other = IndexedDataset(prefix).index
        if other.dtype != self.dtype:
            raise DataError(f"{prefix} holds {other.dtype} tokens, {self.prefix} {self.dtype}: they cannot be joined.")
        before = len(self._lengths)
        self._lengths.frombytes(other.lengths.astype(np.intc).tobytes())
        self._documents.frombytes((other.documents[1:] + before).astype(np.int64).tobytes())
        with bin_path(prefix).open("rb") as file:
            shutil.copyfileobj(file, self._file, 1 << 24)

    def close(self) -> None:
        """Publish the pair."""
        if self._file.closed:
            return
        if self._documents[-1] != len(self._lengths):
            self.discard()
            raise DataError(f"The last document of {self.prefix} was not ended: call end_document().")
        sync(self._file)
        self._file.close()
        with self._temporary_idx.open("xb") as file:
            lengths = np.frombuffer(self._lengths, np.intc) if self._lengths else np.empty(0, np.intc)
            write_index(file, self.dtype, lengths, np.frombuffer(self._documents, np.int64))
            sync(file)
        self._temporary_bin.replace(bin_path(self.prefix))
        self._temporary_idx.replace(idx_path(self.prefix))
        sync_folder(Path(self.prefix).parent)

    def discard(self) -> None:
        """Throw away what was written."""
        self._file.close()
        self._temporary_bin.unlink(missing_ok=True)
        self._temporary_idx.unlink(missing_ok=True)

    def _converted(self, tokens: npt.ArrayLike) -> npt.NDArray[Any]:
        values = np.asarray(tokens)
        if len(values) and (values.min() < self._limits.min or values.max() > self._limits.max):
            raise DataError(
                f"Token id {values.max()} does not fit {self.dtype}: choose the type with the vocabulary size."
            )
        return values.astype(self.dtype)

    def _append_length(self, length: int) -> None:
        if length >= 2**31:
            raise DataError(f"A sequence of {length} tokens does not fit the format, which counts them with 32 bits.")
        self._lengths.append(length)


def merge_datasets(prefixes: Sequence[str | Path], output: str | Path) -> None:
    """Join corpora, in the given order, into a new one.

    Raises:
        DataError: nothing to join, a damaged input, different token types, or an output that is one of the inputs.
    """
    if not prefixes:
        raise DataError("No datasets to join.")
    if Path(output).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise DataError(f"The output {output} is one of the inputs; choose another --output-prefix.")
    with IndexedDatasetWriter(output, read_index(idx_path(prefixes[0])).dtype) as writer:
        for prefix in prefixes:
            writer.add_dataset(prefix)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(file: Any) -> None:
    """Bring a file to the disk."""
    file.flush()
    os.fsync(file.fileno())
