"""Reader of the `.bin/.idx` pair that holds a tokenized corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_file import IndexFile, read_index

Tokens = npt.NDArray[np.int64]
# Sequences whose last token is looked at to recognise the shift that some tools produce.
_EOD_PROBES = 64


class TokenSource(Protocol):
    """What a sample order is built over: sequences of tokens that can be read in parts."""

    @property
    def name(self) -> str:
        """How messages call it."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[sequences] tokens of each."""

    def fingerprint(self) -> str:
        """A hash of the lengths."""

    def read(self, sequence: int, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Tokens `start` to `stop` of one sequence."""


def idx_path(prefix: str | Path) -> Path:
    """`prefix` with `.idx` appended (a prefix may contain dots)."""
    return Path(f"{prefix}.idx")


def bin_path(prefix: str | Path) -> Path:
    """`prefix` with `.bin` appended."""
    return Path(f"{prefix}.bin")


class IndexedDataset:
    """A tokenized corpus on disk, memory-mapped and checked when it is opened.

    Args:
        prefix: path without `.bin` and `.idx`.

    Raises:
        DataError: a file is missing, damaged, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.index = read_index(idx_path(prefix))
        self._tokens = _map_tokens(bin_path(prefix), self.index)
        itemsize = self.index.dtype.itemsize
        self._shift = itemsize.bit_length() - 1

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        # Worker processes map the files again instead of receiving their content.
        return IndexedDataset, (self.prefix,)

    def __len__(self) -> int:
        return len(self.index.lengths)

    def __getitem__(self, sequence: int) -> npt.NDArray[np.generic]:
        """All tokens of one sequence, read-only, in the type of the file."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {self.prefix}, which has {len(self)}")
        return self.read(sequence, 0, int(self.index.lengths[sequence]))

    @property
    def name(self) -> str:
        """The prefix."""
        return self.prefix

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[sequences] tokens of each."""
        return self.index.lengths

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the tokens in the file."""
        return self.index.dtype

    def fingerprint(self) -> str:
        """A hash of the lengths."""
        return self.index.fingerprint()

    def read(self, sequence: int, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Tokens `start` to `stop` of one sequence; the caller keeps them within its length."""
        first = int(self.index.pointers[sequence]) >> self._shift
        return self._tokens[first + start : first + stop]

    def check_vocabulary(self, vocab_size: int, sequences: int = 256) -> None:
        """Look at the tokens of some sequences, spread over the corpus.

        Raises:
            DataError: a token id is negative or not below `vocab_size`: the corpus was made with another tokenizer.
        """
        for sequence in np.unique(np.linspace(0, len(self) - 1, min(sequences, len(self)), dtype=np.int64)):
            check_tokens(self[int(sequence)], vocab_size, f"sequence {sequence} of {self.prefix}")


def check_tokens(tokens: npt.NDArray[np.generic], vocab_size: int, where: str) -> None:
    """Refuse token ids outside of the vocabulary.

    Raises:
        DataError: naming the id and `where` it was read.
    """
    if len(tokens) == 0:
        return
    highest, lowest = int(tokens.max()), int(tokens.min())
    if highest >= vocab_size or lowest < 0:
        raise DataError(
            f"Token id {highest if highest >= vocab_size else lowest} in {where} is outside of the vocabulary of "
            f"{vocab_size}: the data was made with another tokenizer. Check --tokenizer-type and --tokenizer-model."
        )


def _map_tokens(path: Path, index: IndexFile) -> npt.NDArray[np.generic]:
    if not path.is_file():
        raise DataError(f"{path} does not exist, but {index.path} does: both files of a pair are needed.")
    size = path.stat().st_size
    expected = index.num_tokens * index.dtype.itemsize
    if size != expected:
        with path.open("rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                raise DataError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`.")
        if has_shifted_documents(path, index):
            raise DataError(
                f"{path} and {index.path} drift apart by one token per document: they were written with --append-eod "
                "by a version of Megatron-DeepSpeed that forgot to count the EOD tokens. Training on them would cut "
                f"every document in the wrong place. Repair: python -m megatron.data.repair {str(path)[:-4]}"
            )
        kind = "cut short" if size < expected else "too long"
        raise DataError(
            f"{path} is {kind}: it has {size} bytes, {index.path} describes {expected} "
            f"({index.num_tokens} tokens of {index.dtype}). The two are not from the same run; preprocess again."
        )
    if size == 0:
        return np.empty(0, index.dtype)
    # A plain array over the mapping: slicing a numpy.memmap costs several times more.
    return np.asarray(np.memmap(path, index.dtype, "r"))


def last_sequences(index: IndexFile) -> npt.NDArray[np.int64]:
    """The last sequence of each document that holds tokens: where an EOD belongs."""
    first, end = index.documents[:-1], index.documents[1:]
    totals = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))
    filled = totals[end] > totals[first]
    return (end[filled] - 1).astype(np.int64)


def has_shifted_documents(path: Path, index: IndexFile) -> bool:
    """Whether `.bin` has exactly one token more per non-empty document, and these tokens are all the same."""
    extra, odd = divmod(path.stat().st_size - index.num_tokens * index.dtype.itemsize, index.dtype.itemsize)
    if odd or extra <= 0:
        return False
    last = last_sequences(index)
    if extra != len(last):
        return False
    ends = np.cumsum(index.lengths, dtype=np.int64)[last] + np.arange(len(last))
    tokens = np.memmap(path, index.dtype, "r")
    probes = np.linspace(0, len(ends) - 1, min(_EOD_PROBES, len(ends)), dtype=np.int64)
    return len(np.unique(tokens[ends[probes]])) == 1
