"""Bytes of inputs: local or remote, plain or compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from megatron.data.errors import DataError

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_COMPRESSED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MAGIC_BYTES = 6
_PIECE = 1 << 20


def optional(module: str, package: str, what: str) -> ModuleType:
    """A library that only some inputs need.

    Raises:
        DataError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(f"{what} needs the Python package {package}: pip install {package}") from error


def is_remote(name: str) -> bool:
    """Whether a name is a URL such as s3://bucket/file, which fsspec reads."""
    return "://" in name


def expand(pattern: str) -> list[str]:
    """The files that a URL, maybe with a pattern, names.

    Raises:
        DataError: there are none, or nothing can read URLs of this kind.
    """
    fsspec = optional("fsspec", "fsspec", f"--input {pattern}")
    try:
        names = sorted(file.full_name for file in fsspec.open_files(pattern))
    except (ImportError, ValueError) as error:
        raise DataError(f"--input {pattern} cannot be read: {error}") from error
    if not names:
        raise DataError(f"--input {pattern}: nothing is there")
    return names


def size(name: str) -> int:
    """Bytes of a file on its disk."""
    if not is_remote(name):
        return Path(name).stat().st_size
    fsspec = optional("fsspec", "fsspec", name)
    files, path = fsspec.core.url_to_fs(name)
    try:
        return int(files.size(path) or 0)
    except OSError as error:
        raise DataError(f"--input {name} cannot be read: {error}") from error


def open_input(name: str) -> BinaryIO:
    """A file for reading, seekable."""
    if not is_remote(name):
        return Path(name).open("rb")
    fsspec = optional("fsspec", "fsspec", name)
    return cast("BinaryIO", fsspec.open(name, "rb").open())


def plain_name(name: str) -> str:
    """The name in lower case, without the ending of a compression."""
    lower = name.lower()
    return next((lower.removesuffix(end) for end in _COMPRESSED_ENDINGS if lower.endswith(end)), lower)


def decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    """The content of a file, whatever it is compressed with; the first bytes tell, not the name."""
    magic = raw.read(_MAGIC_BYTES)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return cast("BinaryIO", gzip.GzipFile(fileobj=raw))
    if magic.startswith(b"BZh"):
        return cast("BinaryIO", bz2.BZ2File(raw))
    if magic.startswith(b"\xfd7zXZ\x00"):
        return cast("BinaryIO", lzma.LZMAFile(raw))
    if magic.startswith(_ZSTD_MAGIC):
        zstandard = optional("zstandard", "zstandard", f"reading {name} (.zst)")
        return cast("BinaryIO", io.BufferedReader(_ZstdReader(zstandard, raw), _PIECE))
    return raw


class _ZstdReader(io.RawIOBase):
    """A zstd file of any number of frames; seeks forward by reading, and back to the start."""

    def __init__(self, zstandard: ModuleType, raw: BinaryIO) -> None:
        self._zstandard = zstandard
        self._raw = raw
        self._position = 0
        self._open()

    def _open(self) -> None:
        self._raw.seek(0)
        self._frame: Any = None
        self._input = self._output = b""
        self._position = 0

    def _fill(self) -> bool:
        """Decompress until there is something to give out; false at the end."""
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_PIECE)
            if not self._input:
                # The library itself takes a file that was cut short for one that ended.
                if self._frame is not None:
                    raise EOFError("the compressed file was cut short")
                return False
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Decompressed bytes read."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer."""
        try:
            if not self._fill():
                return 0
        except self._zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a decompressed byte."""
        target = offset if whence == io.SEEK_SET else self._position + offset
        if target < self._position:
            self._open()
        scratch = memoryview(bytearray(_PIECE))
        while self._position < target and self.readinto(scratch[: min(len(scratch), target - self._position)]):
            pass
        return self._position
