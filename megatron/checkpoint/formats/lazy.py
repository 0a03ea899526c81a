"""Named tensors that are read when they are needed, and the same tensors under other names and layouts.

A conversion is a chain of such views: nothing is read until a writer asks for a tensor, and then only what that tensor
is made of. So a conversion needs memory for a few tensors, however large the model is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.checkpoint.manifest import TensorRecord
from megatron.model.hf import Entry


@dataclass(frozen=True)
class LazyTensors:
    """Tensors by name.

    Attributes:
        records: shape and dtype of each, known without reading it.
        read: gives one tensor. It may be a view of a mapped file: to be copied from, not to be changed.
    """

    records: Mapping[str, TensorRecord]
    read: Callable[[str], Tensor]

    @property
    def bytes(self) -> int:
        """Size of all tensors together."""
        return sum(math.prod(record.shape) * dtype_of(record).itemsize for record in self.records.values())


def dtype_of(record: TensorRecord) -> torch.dtype:
    """The dtype that a record names."""
    dtype: torch.dtype = getattr(torch, record.dtype)
    return dtype


def record_of(tensor: Tensor) -> TensorRecord:
    """Shape and dtype of a tensor, which may be on the meta device."""
    return TensorRecord(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def meta(record: TensorRecord) -> Tensor:
    """A tensor without data of that shape and dtype."""
    return torch.empty(record.shape, dtype=dtype_of(record), device="meta")


def in_memory(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Tensors that exist already."""
    return LazyTensors({name: record_of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__)


def split_view(theirs: LazyTensors, entries: Iterable[Entry]) -> LazyTensors:
    """Logical tensors out of those of another program, which may hold several in one.

    Args:
        theirs: must have the tensor of every entry.
        entries: which tensor holds what.
    """
    table = list(entries)
    records: dict[str, TensorRecord] = {}
    for entry in table:
        parts = entry.layout.split(meta(theirs.records[entry.theirs]))
        records.update(zip(entry.ours, map(record_of, parts), strict=True))
    return LazyTensors(records, _SplitReader(theirs, table))


class _SplitReader:
    """Reads parts of tensors; the parts of the tensor read last are kept, as the next request is for one of them."""

    def __init__(self, theirs: LazyTensors, table: Iterable[Entry]) -> None:
        self._theirs = theirs
        self._places = {name: (entry, index) for entry in table for index, name in enumerate(entry.ours)}
        self._latest: Entry | None = None
        self._parts: tuple[Tensor, ...] = ()

    def __call__(self, name: str) -> Tensor:
        entry, index = self._places[name]
        if entry is not self._latest:
            self._latest, self._parts = None, ()  # so that two tensors are never in memory
            self._parts, self._latest = entry.layout.split(self._theirs.read(entry.theirs)), entry
        return self._parts[index]


def join_view(ours: LazyTensors, entries: Iterable[Entry]) -> LazyTensors:
    """Tensors of another program made of logical ones; the inverse of `split_view`."""
    table = {entry.theirs: entry for entry in entries}

    def read(name: str) -> Tensor:
        entry = table[name]
        return entry.layout.join(tuple(ours.read(part) for part in entry.ours))

    records = {
        name: record_of(entry.layout.join(tuple(meta(ours.records[part]) for part in entry.ours)))
        for name, entry in table.items()
    }
    return LazyTensors(records, read)


def stack_view(tensors: LazyTensors, stacks: Mapping[str, int]) -> LazyTensors:
    """The same tensors, some of them joined along a new first axis.

    Args:
        tensors: by name.
        stacks: name -> how many tensors are joined, which are called name.0, name.1, ...
    """
    parts = {f"{name}.{number}" for name, count in stacks.items() for number in range(count)}
    records = {name: record for name, record in tensors.records.items() if name not in parts}
    for name, count in stacks.items():
        one = tensors.records[f"{name}.0"]
        records[name] = replace(one, shape=(count, *one.shape))

    def read(name: str) -> Tensor:
        if name not in stacks:
            return tensors.read(name)
        return torch.stack([tensors.read(f"{name}.{number}") for number in range(stacks[name])])

    return LazyTensors(records, read)


def unstack_view(tensors: LazyTensors, stacks: Mapping[str, int]) -> LazyTensors:
    """The inverse of `stack_view`. The tensor read last is kept, as the next request is for another part of it."""
    records = {name: record for name, record in tensors.records.items() if name not in stacks}
    places: dict[str, tuple[str, int]] = {}
    for name, count in stacks.items():
        one = replace(tensors.records[name], shape=tensors.records[name].shape[1:])
        for number in range(count):
            records[f"{name}.{number}"], places[f"{name}.{number}"] = one, (name, number)
    latest: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in places:
            return tensors.read(name)
        stacked, number = places[name]
        if stacked not in latest:
            latest.clear()  # so that two tensors are never in memory
            latest[stacked] = tensors.read(stacked)
        return latest[stacked][number]

    return LazyTensors(records, read)


def cast_view(tensors: LazyTensors, dtype: torch.dtype | None) -> LazyTensors:
    """The same tensors, those of floating point in another dtype; None: unchanged."""
    if dtype is None:
        return tensors
    name_of = str(dtype).removeprefix("torch.")
    records = {
        name: replace(record, dtype=name_of) if dtype_of(record).is_floating_point else record
        for name, record in tensors.records.items()
    }
    return LazyTensors(records, lambda name: tensors.read(name).to(dtype_of(records[name])))


def rows_view(tensors: LazyTensors, rows: Mapping[str, int]) -> LazyTensors:
    """The same tensors, some with another number of rows: cut off, or zeros added.

    Args:
        tensors: by name.
        rows: name -> number of rows wanted; names that `tensors` lacks are ignored.
    """
    records = {
        name: replace(record, shape=(rows[name], *record.shape[1:])) if name in rows else record
        for name, record in tensors.records.items()
    }

    def read(name: str) -> Tensor:
        tensor, wanted = tensors.read(name), records[name].shape
        if tensor.shape == wanted:
            return tensor
        kept = tensor[: wanted[0]]
        if kept.shape == wanted:
            return kept
        return torch.cat((kept, kept.new_zeros(wanted[0] - kept.shape[0], *wanted[1:])))

    return LazyTensors(records, read)
