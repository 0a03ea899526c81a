"""Containers of torch.distributed.checkpoint, read and written by one process that holds one tensor at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from megatron.checkpoint.errors import CorruptCheckpoint
from megatron.checkpoint.formats.lazy import LazyTensors, meta
from megatron.checkpoint.manifest import TensorRecord


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors that have no data, and reads each when it is written."""

    def __init__(self, read: Callable[[str], Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._read(index.fqn)


def write_container(folder: Path, tensors: LazyTensors) -> None:
    """Write tensors into an empty folder and wait until they are on the disk.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    plan = {name: meta(record) for name, record in tensors.records.items()}
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(plan, storage_writer=writer, planner=_LazyPlanner(tensors.read), no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def open_container(folder: Path) -> LazyTensors:
    """The tensors in a container; objects of other kinds are left out.

    Raises:
        CorruptCheckpoint: there is none, or it cannot be read.
    """
    reader = FileSystemReader(folder)
    try:
        index = reader.read_metadata()
    except Exception as error:  # whatever a damaged pickle leads to
        raise CorruptCheckpoint(f"{folder}: its index (.metadata) cannot be read: {error}") from error
    reader.set_up_storage_reader(index, is_coordinator=True)
    entries = {n: e for n, e in index.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    records = {
        name: TensorRecord(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in entries.items()
    }

    def read(name: str) -> Tensor:
        tensor = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({name: tensor}, index, is_coordinator=True)
        try:
            reader.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, RuntimeError) as error:
            raise CorruptCheckpoint(f"{folder}: {name} cannot be read: {error}") from error
        return tensor

    return LazyTensors(records, read)
