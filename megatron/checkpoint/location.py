"""Where checkpoints are: a local folder, or a URL that fsspec understands (`s3://`, `gs://`, `memory://` ...).

A `RemotePath` has those methods of `pathlib.Path` that checkpoints need. Object stores have neither folders nor a
rename that is atomic, but a file there appears as a whole or not at all: `folder` and `publish` build upon that.
"""
# ruff: noqa: D102 - the methods are those of `pathlib.Path`

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from megatron.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_LOCAL = ("file", "local")


@dataclass(frozen=True)
class RemotePath:
    """A place in a file system of fsspec; methods are those of `pathlib.Path`.

    Attributes:
        fs: the file system.
        path: the place in it, as `fs` names it, without a slash at the end.
    """

    fs: AbstractFileSystem
    path: str

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.fs, f"{self.path}/{name}")

    def __lt__(self, other: RemotePath) -> bool:
        return self.path < other.path

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.fs, self.path.rpartition("/")[0])

    def absolute(self) -> RemotePath:
        return self

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def exists(self) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.isdir(self.path))

    def is_file(self) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.isfile(self.path))

    def iterdir(self) -> Iterator[RemotePath]:
        """Nothing for a folder that does not exist: an empty one does not, in most stores."""
        self.fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            for name in self.fs.ls(self.path, detail=False):
                yield RemotePath(self.fs, str(name).rstrip("/"))

    def stat(self) -> SimpleNamespace:
        """With `st_size` alone."""
        self.fs.invalidate_cache()
        return SimpleNamespace(st_size=int(self.fs.size(self.path)))

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Folders above are always made: most stores have none."""
        self.fs.makedirs(self.path, exist_ok=True)

    def open(self, mode: str, buffering: int = -1) -> IO[bytes]:
        return self.fs.open(self.path, mode)  # type: ignore[no-any-return]

    def read_bytes(self) -> bytes:
        with self.open("rb") as file:
            return file.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def rename(self, target: RemotePath) -> None:
        """Move a file; not at once, where the store has to copy it."""
        self.fs.mv(self.path, target.path)

    def unlink(self) -> None:
        self.fs.rm_file(self.path)

    def remove_tree(self) -> None:
        """Remove everything below."""
        self.fs.rm(self.path, recursive=True)

    def sizes_below(self) -> dict[str, int]:
        """Bytes of every file below, by its path relative to this one."""
        self.fs.invalidate_cache()
        found: dict[str, Any] = self.fs.find(self.path, detail=True)
        return {name[len(self.path) + 1 :]: int(info["size"]) for name, info in found.items()}


Location = Path | RemotePath


def is_url(root: object) -> bool:
    """Whether a folder is named by a URL."""
    return isinstance(root, str) and "://" in root


def location(root: str | Location) -> Location:
    """The place that a folder's name means.

    Raises:
        CheckpointError: a URL of a kind that is not installed here.
    """
    if not isinstance(root, str):
        return root
    kind, _, rest = root.partition("://")
    if not is_url(root):
        return Path(root)
    if kind in _LOCAL:
        return Path(rest)
    try:
        fs, path = importlib.import_module("fsspec.core").url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{root}: {error}") from error
    return RemotePath(fs, str(path).rstrip("/"))
