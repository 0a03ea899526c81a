"""Norm and zero count of gradients that are spread over ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

ByCopies = Mapping[int, Sequence[torch.Tensor]]
"""Local tensors grouped by the number of ranks that hold the same elements."""


def shards(tensor: torch.Tensor) -> int:
    """Number of different pieces a tensor is cut into; 1 for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if not placement.is_replicate())


def group_by_copies(tensors: Iterable[torch.Tensor], ranks: int) -> ByCopies:
    """Local parts of `tensors`, each held by `ranks` ranks together."""
    groups: dict[int, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        groups[ranks // shards(tensor)].append(local)
    return groups


def gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients that exist, without those of frozen parameters."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


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


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of `value` over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value
