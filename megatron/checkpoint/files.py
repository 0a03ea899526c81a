"""Files that are on the disk, whole, before anything points to them."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron.checkpoint.location import Location, RemotePath

Progress = Callable[[], None]
"""Told whenever work that may take long gets further, for whoever watches that it does."""

_READ_BYTES = 1 << 20
# Below this handing the data to another thread costs more than hashing it.
_BYTES_WORTH_A_THREAD = 1 << 20


def nothing() -> None:
    """The `Progress` of work that nobody watches."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its length and the SHA-256 of its contents, in hexadecimal."""

    bytes: int
    sha256: str


def sync_folder(folder: Location) -> None:
    """Make the names in a folder survive a power failure; elsewhere a file that was closed does."""
    if isinstance(folder, RemotePath):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Location, data: bytes) -> FileRecord:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        if isinstance(path, Path):
            os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def replace_synced(path: Location, data: bytes) -> None:
    """Give a file new contents: whoever reads it sees the old or the new ones, never a part."""
    if isinstance(path, RemotePath):
        write_synced(path, data)
        return
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    write_synced(temporary, data)
    temporary.replace(path)
    sync_folder(path.parent)


def record_of(path: Location, progress: Progress = nothing) -> FileRecord:
    """Length and hash of a file as it is; calls `progress` after each piece."""
    digest = hashlib.sha256()
    length = 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
            length += count
            progress()
    return FileRecord(length, digest.hexdigest())


def drop_from_cache(path: Location) -> None:
    """Ask the system to forget its copy of a synced file, so that the next reader gets what the disk holds."""
    if isinstance(path, RemotePath) or not hasattr(os, "posix_fadvise"):  # macOS: the copy in memory is read instead
        return
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_below(folder: Location) -> dict[str, int]:
    """Bytes of every file below a folder, by its path relative to the folder with forward slashes."""
    if isinstance(folder, RemotePath):
        return folder.sizes_below()
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def share_of(sizes: Mapping[str, int], rank: int, size: int) -> list[str]:
    """The files that one of `size` ranks takes care of: all bytes spread evenly, every file on one rank."""
    loads = [(0, index) for index in range(size)]
    mine: list[str] = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, lightest = loads[0]
        heapq.heapreplace(loads, (load + sizes[name] + 1, lightest))
        if lightest == rank:
            mine.append(name)
    return mine


class HashingFile:
    """A file that is hashed while it is written and is on the disk once it is closed.

    Errors of the system carry the file's name, which those of `write` lack otherwise. Each `write` ends with a call of
    `progress`.
    """

    def __init__(self, path: Location, progress: Progress) -> None:
        self._path, self._progress = path, progress
        self._file: IO[bytes] = path.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(1)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append to the file; large pieces are hashed while they are written."""
        count = memoryview(data).nbytes
        try:
            if count < _BYTES_WORTH_A_THREAD:
                self._digest.update(data)
                self._file.write(data)
            else:
                hashed = self._pool.submit(self._digest.update, data)
                try:
                    self._file.write(data)
                finally:
                    hashed.result()
        except OSError as error:
            raise self._named(error) from None
        self._bytes += count
        self._progress()
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._named(error) from None

    def close(self) -> None:
        """Wait until the file is on the disk, and release it. Once closed there is nothing more to do."""
        if self._file.closed:
            return
        self.flush()
        try:
            if isinstance(self._path, Path):
                os.fsync(self._file.fileno())
            else:
                self._file.close()  # only now the store has the file
        except OSError as error:
            raise self._named(error) from None
        self.abandon()

    def abandon(self) -> None:
        """Release the file as it is, after an error."""
        self._pool.shutdown()
        with contextlib.suppress(OSError):
            self._file.close()

    def record(self) -> FileRecord:
        """Length and hash of what was written."""
        return FileRecord(self._bytes, self._digest.hexdigest())

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self._path))
