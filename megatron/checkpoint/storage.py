"""How torch.distributed.checkpoint reaches the files of a checkpoint: hashed and synced while they are written."""
# ruff: noqa: D102 - the methods are those of torch's base classes

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from megatron.checkpoint.files import FileRecord, HashingFile, Progress
from megatron.checkpoint.location import Location


class _Files(FileSystemBase):
    """Files below one folder, read; paths are places, which `concat_path` makes."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any]:
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def rename(self, path: Any, new_path: Any) -> None:
        path.rename(new_path)

    def init_path(self, path: Any) -> Any:
        return self._folder

    def mkdir(self, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()


class HashedFiles(_Files):
    """Files that are hashed and synced as they are written; `records` tells of those that are finished."""

    def __init__(self, folder: Location, progress: Progress) -> None:
        super().__init__(folder)
        self._progress = progress
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any]:
        if mode != "wb":
            raise ValueError(f"mode {mode!r}: this file system only writes")
        file = HashingFile(path, self._progress)
        try:
            yield file
            file.close()
        except BaseException:
            file.abandon()
            raise
        self.records[path.name] = file.record()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.records[new_path.name] = self.records.pop(path.name)


class Writer(FileSystemWriter):
    """Writes one file per rank; a full disk is reported as such and not as a malformed archive."""

    def __init__(self, folder: Location, files: HashedFiles) -> None:
        # Synced by `files`. Nothing is copied ahead: that needs streams, which not every device has.
        super().__init__(Path(), single_file_per_rank=True, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self.fs, self.path = files, folder

    @property
    def checkpoint_id(self) -> str:
        """What the index records as its place."""
        return str(self.path)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        return _telling_system_errors(lambda: super(Writer, self).write_data(plan, planner))


class Reader(FileSystemReader):
    """Reads what `Writer` wrote."""

    def __init__(self, folder: Location) -> None:
        super().__init__(Path())
        self.fs, self.path = _Files(folder), folder


def _telling_system_errors(step: Callable[[], Future[Any]]) -> Future[Any]:
    """Run a step; of the errors that led to its exception raise the one of the operating system, if there is one."""
    try:
        return step()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None
