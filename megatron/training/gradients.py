"""Norm and zero count of gradients that are spread over ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron.model.weights import holders
from megatron.mpu.groups import ProcessGroups
from megatron.mpu.local import local

ByCopies = Mapping[int, Sequence[torch.Tensor]]
"""Local tensors grouped by the number of ranks that hold the same elements."""


def shards(tensor: torch.Tensor) -> int:
    """Number of different pieces a tensor is cut into; 1 for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if not placement.is_replicate())


def copies_of(name: str, parameter: torch.Tensor, groups: ProcessGroups) -> int:
    """Number of ranks of a pipeline stage that hold the same elements of a parameter, by its logical name."""
    if isinstance(parameter, DTensor):
        return groups.world.size // groups.pp.size // shards(parameter)
    return holders(name, groups)


def group_by_copies(tensors: Mapping[str, torch.Tensor], copies: Mapping[str, int]) -> ByCopies:
    """Local parts of `tensors`, by the number of their copies."""
    groups: dict[int, list[torch.Tensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        groups[copies[name]].append(local(tensor))
    return groups


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The gradients that exist, without those of frozen parameters."""
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def sum_over_data(parameters: Mapping[str, nn.Parameter], groups: ProcessGroups, dtype: torch.dtype) -> None:
    """Sum gradients that are plain tensors over the ranks that hold the same weights, in `dtype`, in place."""
    for gradient in gradients(parameters).values():
        gradient.copy_(groups.sum_over_data(gradient.to(dtype)))


def square_sum(tensors: ByCopies, device: torch.device) -> torch.Tensor:
    """This rank's share of the squared L2 norm: shares of all ranks add up to it, each element counted once."""
    total = torch.zeros((), dtype=torch.float32, device=device)
    for copies, group in tensors.items():
        norm = torch.nn.utils.get_total_norm([tensor for tensor in group if tensor.numel()])
        total += norm.to(device=device, dtype=torch.float32).square() / copies
    return total


def zero_count(tensors: ByCopies, device: torch.device) -> torch.Tensor:
    """This rank's share of the number of elements that are zero."""
    total = torch.zeros((), dtype=torch.float32, device=device)
    for copies, group in tensors.items():
        for tensor in group:
            total += (tensor.numel() - torch.count_nonzero(tensor)) / copies
    return total
