"""Tensors to files and back, through torch.distributed.checkpoint: one file per rank, any layout into any other.

A tensor has a name and a logical shape. A `DTensor` and `Parts` know which part of it a rank holds, each part is
written once, and whoever reads takes what overlaps with its own part. A plain tensor is the same on every rank that has
it.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from megatron.checkpoint.files import Progress, nothing
from megatron.checkpoint.location import Location
from megatron.checkpoint.manifest import TensorRecord
from megatron.checkpoint.parts import Parts, Stored
from megatron.checkpoint.publish import Written
from megatron.checkpoint.ranks import Failure, Ranks, RanksFailed
from megatron.checkpoint.storage import HashedFiles, Reader, Writer
from megatron.checkpoint.vocabulary import has_vocabulary_rows


def write_tensors(folder: Location, tensors: Mapping[str, Stored], vocab_size: int | None, ranks: Ranks) -> Written:
    """Write this rank's part of the tensors and sync it. Called by all ranks.

    Args:
        folder: an empty folder.
        tensors: by name; ranks may have different ones.
        vocab_size: rows of the embedding that are stored; None: all.
        ranks: who writes.

    Raises:
        RanksFailed: on all ranks, if anything failed on any.
    """
    files = HashedFiles(folder, ranks.progress)
    with _failures_on_all_ranks(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        metadata = save(
            dict(tensors),
            storage_writer=Writer(folder, files),
            planner=_SavePlanner(vocab_size),
            process_group=ranks.group,
            no_dist=ranks.size == 1,
        )
    records = {name: TensorRecord(size, dtype) for name, size, dtype in stored_tensors(metadata)}
    return Written(files.records, records if ranks.is_first else {})


def read_tensors(folder: Location, into: Mapping[str, Stored], ranks: Ranks) -> None:
    """Fill tensors in place with what a checkpoint holds under their names. Called by all ranks.

    Rows of `into` beyond the stored vocabulary become zero. Values are converted to the dtype of the tensor.

    Raises:
        RanksFailed: on all ranks, if anything failed on any; the tensors are then of no use.
    """
    with _failures_on_all_ranks(), warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(
            dict(into),
            storage_reader=Reader(folder),
            planner=_LoadPlanner(ranks.progress),
            process_group=ranks.group,
            no_dist=ranks.size == 1,
        )


def read_index(folder: Location) -> Metadata:
    """The index of the tensor files: which part of which tensor is in which file."""
    return Reader(folder).read_metadata()


def stream_tensors(folder: Location) -> Generator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, whole, with its name; one process, one tensor in memory at a time."""
    reader = Reader(folder)
    index = reader.read_metadata()
    reader.set_up_storage_reader(index, is_coordinator=True)
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            planner = _LoadPlanner()
            planner.set_up_planner({name: tensor}, index, is_coordinator=True)
            reader.read_data(planner.create_local_plan(), planner).wait()
            yield name, tensor


def stored_tensors(metadata: Metadata) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, logical shape and dtype (without "torch.") of every tensor that an index of files lists."""
    return [
        (name, tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    ]


@contextmanager
def _failures_on_all_ranks() -> Generator[None]:
    """torch.distributed.checkpoint tells every rank of every rank's errors; pass them on as ours."""
    try:
        yield
    except CheckpointException as error:
        raise RanksFailed(Failure.of(rank, cause) for rank, (cause, _) in error.failures.items()) from error


class _SavePlanner(DefaultSavePlanner):
    """Plans to write the real rows of the vocabulary only, and refuses layouts that it cannot describe."""

    def __init__(self, vocab_size: int | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._vocab_size = vocab_size

    def create_local_plan(self) -> SavePlan:
        for name, tensor in self.state_dict.items():
            _check_kind(name, tensor)
        items = []
        for item in super().create_local_plan().items:
            self._check_part(item)
            if (kept := self._without_padding(item)) is not None:
                items.append(kept)
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Of parts with the same place one is written, so all that claim the place must describe the same."""
        if problem := _disagreement(all_plans):
            raise ValueError(problem)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = _held(self.state_dict, index)
        return super().lookup_object(index) if held is None else held

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        tensor = super().transform_object(write_item, object)
        data = write_item.tensor_data
        if data is None or tensor.shape == data.chunk.sizes:
            return tensor
        return tensor[: data.chunk.sizes[0]]

    def _check_part(self, item: WriteItem) -> None:
        tensor = self.state_dict[item.index.fqn]
        if not isinstance(tensor, DTensor):
            return
        if item.tensor_data is None or item.tensor_data.chunk.sizes != tensor.to_local().shape:
            raise ValueError(f"{item.index.fqn} is placed in a way that cannot be saved: {tensor.placements}")

    def _without_padding(self, item: WriteItem) -> WriteItem | None:
        """The item without rows that only pad the vocabulary; None if nothing remains."""
        data, rows = item.tensor_data, self._vocab_size
        if data is None or rows is None or not has_vocabulary_rows(item.index.fqn, data.size):
            return item
        if rows > data.size[0]:
            raise ValueError(f"{item.index.fqn} has {data.size[0]} rows, fewer than the vocabulary's {rows}")
        here = min(data.chunk.sizes[0], rows - data.chunk.offsets[0])
        if here <= 0:
            return None
        chunk = ChunkStorageMetadata(data.chunk.offsets, torch.Size([here, *data.chunk.sizes[1:]]))
        return replace(item, tensor_data=replace(data, chunk=chunk, size=torch.Size([rows, *data.size[1:]])))


def _check_kind(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor | Parts):
        raise TypeError(f"{name} is {type(tensor).__name__}, not a tensor; put it into `progress`")
    if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"{name} is {tensor.placements}: sums that are not yet taken cannot be saved")


def _held(tensors: Mapping[str, Any], index: MetadataIndex) -> Tensor | None:
    """The box of `Parts` that an index means; None if it is a part of something else."""
    parts = tensors[index.fqn]
    return parts.held[index.offset] if isinstance(parts, Parts) and index.offset is not None else None


def _disagreement(plans: Sequence[SavePlan]) -> str | None:
    """How the ranks' ideas of a tensor differ; None if they do not."""
    tensors: dict[str, tuple[torch.Size, torch.dtype]] = {}
    parts: dict[MetadataIndex, torch.Size] = {}
    for rank, item in ((rank, item) for rank, plan in enumerate(plans) for item in plan.items):
        name, data = item.index.fqn, item.tensor_data
        if data is None:
            continue
        size, dtype = tensors.setdefault(name, (data.size, data.properties.dtype))
        if (size, dtype) != (data.size, data.properties.dtype):
            here = f"{list(data.size)} {data.properties.dtype}"
            return f"{name} is {list(size)} {dtype} on one rank, {here} on rank {rank}: it must be a DTensor"
        if parts.setdefault(item.index, data.chunk.sizes) != data.chunk.sizes:
            return f"{name}: rank {rank} holds a part that overlaps with another rank's"
    return None


class _LoadPlanner(DefaultLoadPlanner):
    """Reads a vocabulary into a tensor with more rows: what is not stored becomes zero."""

    def __init__(self, progress: Progress = nothing) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._progress = progress

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        if metadata is None:
            raise ValueError("the index of the tensor files is missing")
        entries = dict(metadata.state_dict_metadata)
        for name, tensor in state_dict.items():
            entry = entries.get(name)
            if isinstance(entry, TensorStorageMetadata) and has_vocabulary_rows(name, tensor.shape):
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
                entries[name] = replace(entry, size=tensor.shape)
        # What the base class does besides, with no state to flatten, is to drop whatever is no tensor.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = replace(metadata, state_dict_metadata=entries)
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        self._progress()
        held = _held(self.state_dict, index)
        return super().lookup_tensor(index) if held is None else held
