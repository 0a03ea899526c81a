"""Tensors of which a rank holds boxes: what becomes of a part of a tensor when flat memory is shared between ranks.

ZeRO lays parameters one after the other and gives every rank an equal piece of that memory. The piece of a parameter
that a rank gets begins and ends anywhere in a row. Elements that follow each other in memory are a few boxes: the rest
of the first row, whole rows, the beginning of the last row, and each of them is a view of that memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Box:
    """Where a block of elements begins in a tensor, and its size, along every axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """The elements [start, stop) of a row-major tensor as boxes, in order: at most two per axis, less one.

    Args:
        start, stop: numbers of elements, 0 <= start, stop <= number of elements of the tensor.
        shape: of the tensor.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield Box((start,), (stop - start,)) if shape else Box((), ())
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:  # within one row
        yield from _within(last, start, stop, shape)
        return
    yield from _within(first - 1, start, first * inner, shape)
    if first < last:
        yield Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _within(last, last * inner, stop, shape)


def _within(row: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Elements that all lie in one row along the first axis."""
    before = row * math.prod(shape[1:])
    for box in boxes(start - before, stop - before, shape[1:]):
        yield Box((row, *box.offsets), (1, *box.sizes))


@dataclass(frozen=True)
class Place:
    """Which part of a logical tensor a rank's own tensor is."""

    shape: tuple[int, ...]
    """Of the logical tensor."""
    index: tuple[slice, ...]
    """The part, with a start and a stop along every axis."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the part begins."""
        return tuple(part.start for part in self.index)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(part.stop - part.start for part in self.index)


@dataclass(frozen=True)
class Parts:
    """The boxes of a logical tensor that this rank holds; torch.distributed.checkpoint treats it as a sharded tensor.

    Attributes:
        shape: of the logical tensor.
        dtype: of its elements.
        held: the boxes, by where they begin in the logical tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    held: Mapping[torch.Size, Tensor]

    is_meta = False

    @classmethod
    def of_range(cls, flat: Tensor, start: int, place: Place) -> Parts:
        """What consecutive elements of a rank's own tensor are in the logical one.

        Args:
            flat: [n], the elements: a view, into which a checkpoint is loaded.
            start: number of the first one in the rank's own tensor, row by row.
            place: which part of the logical tensor the rank's own one is.
        """
        held: dict[torch.Size, Tensor] = {}
        at = 0
        for box in boxes(start, start + flat.numel(), place.sizes):
            offsets = torch.Size(a + b for a, b in zip(place.offsets, box.offsets, strict=True))
            elements = math.prod(box.sizes)
            held[offsets] = flat[at : at + elements].view(box.sizes)
            at += elements
        return cls(torch.Size(place.shape), flat.dtype, held)

    def size(self) -> torch.Size:
        """Shape of the logical tensor, under the name that a tensor has it."""
        return self.shape

    @classmethod
    def of_tensor(cls, tensor: Tensor, place: Place) -> Parts:
        """What a rank's own tensor is in the logical one: a single box, into which a checkpoint is loaded."""
        return cls(torch.Size(place.shape), tensor.dtype, {torch.Size(place.offsets): tensor.detach()})

    def map(self, change: Callable[[Tensor], Tensor]) -> Parts:
        """The same boxes with other tensors of the same shapes, such as copies."""
        return Parts(self.shape, self.dtype, {offsets: change(tensor) for offsets, tensor in self.held.items()})

    def zero_(self) -> None:
        """Set what is held to zero."""
        for tensor in self.held.values():
            tensor.zero_()

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, tensor.shape) for offsets, tensor in self.held.items()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.held[chunk.offsets]),
                    size=self.shape,
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]


Stored = Tensor | Parts
"""What a checkpoint holds under one name."""
