"""Containers of torch.distributed.checkpoint, read and written by one process that holds one tensor at a time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from megatron.checkpoint.errors import CorruptCheckpoint
from megatron.checkpoint.formats.lazy import LazyTensors, meta
from megatron.checkpoint.manifest import TensorRecord


class _LazyPlanner(DefaultSavePlanner):
    """Plans from shapes, and reads each tensor when it is written."""

    def __init__(self, tensors: LazyTensors, stacks: Mapping[str, Sequence[str]], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._stacks, self._objects = tensors, stacks, objects

    def create_local_plan(self) -> SavePlan:
        stacked = {name for names in self._stacks.values() for name in names}
        items = [self._item(name, meta(r), None) for name, r in self._tensors.records.items() if name not in stacked]
        for name, parts in self._stacks.items():
            like = meta(self._tensors.records[parts[0]])
            items += [self._item(name, like, (index, len(parts))) for index in range(len(parts))]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        self.plan = SavePlan(items)
        return self.plan

    def _item(self, name: str, like: Tensor, place: tuple[int, int] | None) -> WriteItem:
        """One tensor; `place` is its index in a stack of so many."""
        size = like.shape if place is None else torch.Size((place[1], *like.shape))
        sizes = like.shape if place is None else torch.Size((1, *like.shape))
        offsets = torch.Size([0] * len(size)) if place is None else torch.Size((place[0], *[0] * like.dim()))
        data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties.create_from_tensor(like), size)
        return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.fqn in self._objects:
            return self._objects[index.fqn]
        if index.fqn not in self._stacks:
            return self._tensors.read(index.fqn)
        assert index.offset is not None
        return self._tensors.read(self._stacks[index.fqn][index.offset[0]])[None]


def write_container(
    folder: Path,
    tensors: LazyTensors,
    *,
    stacks: Mapping[str, Sequence[str]] | None = None,
    objects: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors into an empty folder and wait until they are on the disk.

    Args:
        folder: where to.
        tensors: what to write.
        stacks: name -> those of `tensors` that are stored as one tensor of this name, one after the other on a new
            first axis.
        objects: other things to store, by name.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    planner = _LazyPlanner(tensors, stacks or {}, objects or {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


class _PartPlanner(DefaultLoadPlanner):
    """Reads a part of one tensor."""

    def __init__(self, name: str, entry: TensorStorageMetadata, part: ChunkStorageMetadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._name, self._entry, self._part = name, entry, part
        self.tensor = torch.empty(part.sizes, dtype=entry.properties.dtype)

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(create_read_items_for_chunk_list(self._name, self._entry, [self._part]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.tensor


class _ObjectPlanner(DefaultLoadPlanner):
    """Gives the bytes of stored objects."""

    def __init__(self, name: str) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state_dict = {name: io.BytesIO()}
        self.content = b""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.content = value.getvalue()


class Container:
    """A container that is open for reading.

    Raises:
        CorruptCheckpoint: there is none, or its index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._index: Metadata = self._reader.read_metadata()
        except Exception as error:  # whatever a damaged pickle leads to
            raise CorruptCheckpoint(f"{folder}: its index (.metadata) cannot be read: {error}") from error
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)

    def tensors(self) -> LazyTensors:
        """All tensors."""
        return LazyTensors({name: _record(entry) for name, entry in self._entries().items()}, self.read)

    def object_names(self) -> list[str]:
        """What else is stored."""
        entries = self._index.state_dict_metadata.items()
        return [name for name, entry in entries if isinstance(entry, BytesStorageMetadata)]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A whole tensor, or what is at one index of its first axis.

        Raises:
            CorruptCheckpoint: a file is missing or damaged.
        """
        entry = self._entries()[name]
        size = entry.size if index is None else torch.Size((1, *entry.size[1:]))
        offsets = torch.Size([0] * len(size)) if index is None else torch.Size((index, *[0] * (len(size) - 1)))
        planner = _PartPlanner(name, entry, ChunkStorageMetadata(offsets, size))
        self._read(name, planner)
        return planner.tensor if index is None else planner.tensor[0]

    def read_bytes(self, name: str) -> bytes:
        """The bytes of an object: a file of torch.save.

        Raises:
            CorruptCheckpoint: a file is missing or damaged.
        """
        planner = _ObjectPlanner(name)
        planner.set_up_planner({name: io.BytesIO()}, self._index, is_coordinator=True)
        self._read(name, planner)
        return planner.content

    def _read(self, name: str, planner: DefaultLoadPlanner) -> None:
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, RuntimeError, EOFError) as error:
            raise CorruptCheckpoint(f"{self._folder}: {name} cannot be read: {error}") from error

    def _entries(self) -> dict[str, TensorStorageMetadata]:
        entries = self._index.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _record(entry: TensorStorageMetadata) -> TensorRecord:
    return TensorRecord(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
