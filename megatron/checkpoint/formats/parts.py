"""The parts of a tensor that tensor-parallel ranks hold: cut it, put it together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats.lazy import LazyTensors
from megatron.checkpoint.formats.torch_write import TorchFile
from megatron.checkpoint.manifest import TensorRecord


@dataclass(frozen=True)
class Split:
    """A tensor that is cut along one dimension.

    Attributes:
        dim: the dimension.
        blocks: the tensor is so many equal blocks along `dim`, and every rank has its share of each: [gate; up] is cut
            into [gate_0; up_0], [gate_1; up_1], ...
    """

    dim: int
    blocks: int = 1


def cut(tensor: Tensor, split: Split | None, ranks: int) -> list[Tensor]:
    """The part of each rank; without a split every rank has the whole tensor. The length must be divisible."""
    if split is None:
        return [tensor] * ranks
    if split.blocks == 1:
        return list(tensor.chunk(ranks, split.dim))
    shares = tensor.unflatten(split.dim, (split.blocks, ranks, -1)).unbind(split.dim + 1)
    return [share.flatten(split.dim, split.dim + 1) for share in shares]


def joined(parts: Sequence[Tensor], split: Split | None, name: str, *, average: bool) -> Tensor:
    """The tensor whose parts these are; the inverse of `cut`.

    Args:
        parts: of all ranks, in their order.
        split: how it was cut.
        name: for messages.
        average: of copies that differ take the mean.

    Raises:
        CorruptCheckpoint: copies that should be equal are not, and `average` is off.
    """
    if len(parts) == 1:
        return parts[0]
    if split is None:
        return _common(parts, name, average=average)
    if split.blocks == 1:
        return torch.cat(list(parts), split.dim)
    blocks = [part.unflatten(split.dim, (split.blocks, -1)) for part in parts]
    return torch.cat(blocks, split.dim + 1).flatten(split.dim, split.dim + 1)


def _common(copies: Sequence[Tensor], name: str, *, average: bool) -> Tensor:
    first, *others = copies
    if all(torch.equal(first, other) for other in others):
        return first
    if average:
        return torch.stack([copy.float() for copy in copies]).mean(0).to(first.dtype)
    worst = max(float((first.float() - other.float()).abs().max()) for other in others)
    raise CorruptCheckpoint(
        f"{name} should be the same on all {len(copies)} tensor-parallel ranks, but differs by up to {worst:.3g}: the "
        "copies drifted apart in training. --average-replicas takes their mean"
    )


def part_record(record: TensorRecord, split: Split | None, ranks: int, name: str) -> TensorRecord:
    """Shape and dtype of one rank's part.

    Raises:
        CheckpointError: the tensor cannot be divided evenly.
    """
    if split is None:
        return record
    length = record.shape[split.dim]
    if length % (ranks * split.blocks):
        raise CheckpointError(
            f"dimension {split.dim} of {name} has length {length}"
            + (f" ({split.blocks} blocks)" if split.blocks > 1 else "")
            + f", which cannot be divided over {ranks} ranks (--target-tensor-parallel-size)"
        )
    shape = list(record.shape)
    shape[split.dim] = length // ranks
    return replace(record, shape=tuple(shape))


def write_parts(
    files: Sequence[TorchFile], tensors: LazyTensors, splits: Mapping[str, Split | None], slots: Mapping[str, str]
) -> None:
    """Give every rank's file its parts; each tensor is read once.

    Args:
        files: one per tensor-parallel rank.
        tensors: whole tensors.
        splits: how each is cut.
        slots: slot of the files -> name of the tensor.
    """
    for slot, name in slots.items():
        for file, part in zip(files, cut(tensors.read(name), splits[name], len(files)), strict=True):
            file.write(slot, part)


def even_stages(num_layers: int, stages: int) -> list[range]:
    """The layers of each pipeline stage.

    Raises:
        CheckpointError: they cannot be divided evenly.
    """
    each, rest = divmod(num_layers, stages)
    if rest:
        raise CheckpointError(
            f"{num_layers} layers cannot be divided over {stages} pipeline stages (--target-pipeline-parallel-size)"
        )
    return [range(stage * each, (stage + 1) * each) for stage in range(stages)]
