"""The `.idx` file (MMIDIDX): what it holds, how it is checked, how it is written.

Little endian, byte for byte the format of Megatron:

    offset   type      content
    0        9 bytes   b"MMIDIDX" and two zero bytes
    9        u64       version, 1
    17       u8        code of the token type
    18       u64       S, number of sequences
    26       u64       D, length of the document index (documents + 1)
    34       i32[S]    tokens of each sequence
    34+4S    i64[S]    byte offset of each sequence in `.bin` (exclusive prefix sum)
    34+12S   i64[D]    number of the first sequence of each document; the last entry is S

`.bin` holds the tokens and nothing else.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_FLOAT_CODES = (6, 7)
_LARGEST_UINT16_VOCABULARY = 65500
# Work on the index in pieces that stay in the processor's cache; it may hold many millions of entries.
_CHUNK = 1 << 18

Array = npt.NDArray[np.generic]


def token_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The token type Megatron writes for a vocabulary: uint16 below 65500 tokens, else (or if unknown) int32."""
    if vocab_size is not None and vocab_size < _LARGEST_UINT16_VOCABULARY:
        return TOKEN_DTYPES[8]
    return TOKEN_DTYPES[4]


def dtype_code(dtype: np.dtype[Any]) -> int:
    """The code of a token type in the header.

    Raises:
        DataError: the format has no code for it, or it is no integer.
    """
    for code, known in TOKEN_DTYPES.items():
        if known == dtype:
            return code
    raise DataError(f"Tokens cannot be stored as {dtype}; allowed: {', '.join(str(d) for d in TOKEN_DTYPES.values())}.")


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """The content of one checked `.idx` file. The arrays are read-only views of the mapped file, maybe unaligned."""

    path: Path
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    """[S] tokens of each sequence."""
    pointers: npt.NDArray[np.int64]
    """[S] byte offset of each sequence in `.bin`."""
    documents: npt.NDArray[np.int64]
    """[documents + 1] first sequence of each document."""
    num_tokens: int

    def fingerprint(self) -> str:
        """A hash of the sequence lengths: everything a sample order depends on."""
        return hashlib.sha256(self.lengths.view(np.uint8).data).hexdigest()


def read_index(path: Path) -> IndexFile:
    """Map an `.idx` file and check all of it against itself.

    Raises:
        DataError: the file is missing, of another kind, cut short, or contradicts itself.
    """
    content = _map(path)
    dtype, num_sequences, num_documents = _read_header(path, content)
    expected = HEADER.size + 12 * num_sequences + 8 * num_documents
    if len(content) == expected + num_sequences and num_sequences:
        raise DataError(f"{path} has a mode per sequence: it is a multimodal index, which this reader does not take.")
    if len(content) != expected:
        kind = "cut short" if len(content) < expected else "longer than its header says"
        raise DataError(
            f"{path} is {kind}: {len(content)} bytes, but {num_sequences} sequences and {num_documents} "
            f"document entries take {expected}. Copy or preprocess it again."
        )
    lengths = np.frombuffer(content, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    documents = np.frombuffer(content, "<i8", num_documents, HEADER.size + 12 * num_sequences)
    num_tokens = _check_sequences(path, lengths, pointers, dtype.itemsize)
    _check_documents(path, documents, num_sequences)
    return IndexFile(
        path=path, dtype=dtype, lengths=lengths, pointers=pointers, documents=documents, num_tokens=num_tokens
    )


def _map(path: Path) -> mmap.mmap | bytes:
    if not path.is_file():
        raise DataError(f"{path} does not exist. A data path is given without .bin and .idx; both files must be there.")
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_header(path: Path, content: mmap.mmap | bytes) -> tuple[np.dtype[Any], int, int]:
    start = bytes(content[: HEADER.size])
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from.")
    if start.startswith(b"TNTIDX"):
        raise DataError(f"{path} has the old TNTIDX format (lazy/cached). Preprocess the text again.")
    if not start.startswith(MAGIC[: len(start)]):
        raise DataError(f"{path} is not an index file: it starts with {start[:9]!r}, not {MAGIC!r}.")
    if len(start) < HEADER.size:
        raise DataError(f"{path} is cut short: {len(start)} bytes, the header alone takes {HEADER.size}.")
    _, version, code, num_sequences, num_documents = HEADER.unpack(start)
    if version != VERSION:
        raise DataError(f"{path} has version {version}; only version {VERSION} is known.")
    if code in _FLOAT_CODES:
        raise DataError(f"{path} holds floating-point values (code {code}), not tokens.")
    if code not in TOKEN_DTYPES:
        raise DataError(f"{path} has the unknown token type code {code}; known: {sorted(TOKEN_DTYPES)}.")
    return TOKEN_DTYPES[code], num_sequences, num_documents


def _check_sequences(path: Path, lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64], itemsize: int) -> int:
    """The number of tokens; refuses negative lengths and offsets that are not the sums of the lengths before."""
    start = 0
    for first in range(0, len(lengths), _CHUNK):
        chunk = lengths[first : first + _CHUNK].astype(np.int64)
        if chunk.min() < 0:
            where = first + int(np.argmin(chunk))
            raise DataError(f"{path} is damaged: sequence {where} has the length {lengths[where]}.")
        chunk *= itemsize
        ends = np.cumsum(chunk) + start
        wrong = pointers[first : first + _CHUNK] != ends - chunk
        if wrong.any():
            where = first + int(np.argmax(wrong))
            raise DataError(
                f"{path} is damaged: sequence {where} starts at byte {pointers[where]}, but the sequences before it "
                f"end at byte {(ends - chunk)[where - first]}."
            )
        start = int(ends[-1])
    return start // itemsize


def _check_documents(path: Path, documents: npt.NDArray[np.int64], num_sequences: int) -> None:
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != num_sequences:
        ends = "nothing" if len(documents) == 0 else f"{documents[0]} to {documents[-1]}"
        raise DataError(f"{path} is damaged: its document index covers {ends}, not 0 to {num_sequences}.")
    for first in range(0, len(documents) - 1, _CHUNK):
        chunk = documents[first : first + _CHUNK + 1]
        falls = chunk[1:] < chunk[:-1]
        if falls.any():
            raise DataError(
                f"{path} is damaged: its document index falls at entry {first + int(np.argmax(falls)) + 1}."
            )


def write_index(
    file: BinaryIO, dtype: np.dtype[Any], lengths: npt.NDArray[np.int32], documents: npt.NDArray[np.int64]
) -> None:
    """Write a whole `.idx`: lengths [S] in tokens, documents [documents + 1] as first sequence numbers."""
    file.write(HEADER.pack(MAGIC, VERSION, dtype_code(dtype), len(lengths), len(documents)))
    _write_chunks(file, (lengths[i : i + _CHUNK].astype("<i4") for i in range(0, len(lengths), _CHUNK)))
    _write_chunks(file, _pointers(lengths, dtype.itemsize))
    _write_chunks(file, (documents[i : i + _CHUNK].astype("<i8") for i in range(0, len(documents), _CHUNK)))


def _pointers(lengths: npt.NDArray[np.int32], itemsize: int) -> Iterable[Array]:
    start = 0
    for first in range(0, len(lengths), _CHUNK):
        sizes = lengths[first : first + _CHUNK].astype("<i8") * itemsize
        ends = np.cumsum(sizes) + start
        yield ends - sizes
        start = int(ends[-1])


def _write_chunks(file: BinaryIO, chunks: Iterable[Array]) -> None:
    for chunk in chunks:
        file.write(chunk.tobytes())
