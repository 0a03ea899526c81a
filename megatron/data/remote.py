"""Corpora in object storage (s3://, gs://, hf://, ...), through fsspec."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_file import read_index
from megatron.data.indexed_dataset import check_tokens

_PROBES = 16


def is_remote(prefix: str) -> bool:
    """Whether a prefix is a URL."""
    return "://" in prefix


class RemoteDataset:
    """A corpus of which the `.idx` is copied here once and the `.bin` is read in the ranges that samples need.

    Args:
        prefix: URL without `.bin` and `.idx`.
        cache: folder for the copy of the `.idx`.

    Raises:
        DataError: a file is missing, damaged, or the two do not belong together.
    """

    def __init__(self, prefix: str, cache: Path) -> None:
        self.prefix = prefix
        self.cache = cache
        self._files, path = _filesystem(prefix)
        self._bin = f"{path}.bin"
        try:
            stamp = repr(sorted((k, str(v)) for k, v in self._files.info(f"{path}.idx").items() if k != "atime"))
            size = self._files.size(self._bin)
            copy = cache / f"{hashlib.sha256((prefix + stamp).encode()).hexdigest()[:24]}.idx"
            if not copy.exists():
                cache.mkdir(parents=True, exist_ok=True)
                partial = copy.with_suffix(f".{id(self):x}.part")
                self._files.get_file(f"{path}.idx", str(partial))
                partial.replace(copy)
        except (OSError, ValueError) as error:
            raise DataError(f"{prefix}: {error}") from error
        self.index = read_index(copy)
        expected = self.index.num_tokens * self.index.dtype.itemsize
        if size != expected:
            raise DataError(f"{prefix}.bin has {size} bytes, its .idx describes {expected}: not from the same run.")

    def __reduce__(self) -> tuple[type[RemoteDataset], tuple[str, Path]]:
        return RemoteDataset, (self.prefix, self.cache)

    @property
    def name(self) -> str:
        """The prefix."""
        return self.prefix

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[sequences] tokens of each."""
        return self.index.lengths

    def fingerprint(self) -> str:
        """A hash of the lengths."""
        return self.index.fingerprint()

    def read(self, sequence: int, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Tokens `start` to `stop` of one sequence."""
        width = self.index.dtype.itemsize
        first = int(self.index.pointers[sequence]) + start * width
        if stop <= start:
            return np.empty(0, self.index.dtype)
        try:
            data = self._files.cat_file(self._bin, start=first, end=first + (stop - start) * width)
        except OSError as error:
            raise DataError(f"{self.prefix}.bin cannot be read: {error}") from error
        return np.frombuffer(data, self.index.dtype, stop - start)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Look at the tokens of a few sequences.

        Raises:
            DataError: a token id is outside of the vocabulary.
        """
        for sequence in np.unique(np.linspace(0, len(self.lengths) - 1, _PROBES, dtype=np.int64)).tolist():
            tokens = self.read(sequence, 0, int(self.lengths[sequence]))
            check_tokens(tokens, vocab_size, f"sequence {sequence} of {self.prefix}")


def _filesystem(prefix: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise DataError(f"{prefix} is a URL, which needs the Python package fsspec: pip install fsspec") from error
    try:
        files, path = fsspec.core.url_to_fs(prefix)
    except (ImportError, ValueError) as error:
        raise DataError(f"{prefix} cannot be read: {error}") from error
    return files, path
