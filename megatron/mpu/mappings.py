"""Collectives with a gradient, in the pairs that tensor and sequence parallelism are made of.

Each mapping's backward is the transpose of its forward; the group is an argument; a group of one is the identity.
Hidden states are [s, b, h] (s=sequence, b=micro-batch, h=hidden); the sequence is dimension 0.
Paper: Shoeybi et al. 2019 (arXiv:1909.08053) for copy/reduce, Korthikanti et al. 2022 (arXiv:2205.05198) for the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mpu import collectives
from megatron.mpu.groups import Group


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return collectives.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, partial_grad: bool) -> Tensor:
        ctx.group, ctx.partial_grad = group, partial_grad
        return collectives.all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.partial_grad:
            return collectives.reduce_scatter(grad, ctx.group), None, None
        return collectives.own_part(grad, ctx.group).contiguous(), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return collectives.reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.all_gather(grad, ctx.group), None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return torch.cat(collectives.all_gather(x.unsqueeze(0), group).unbind(0), dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.own_part(grad, ctx.group, dim=-1).contiguous(), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sent: list[int] | None, received: list[int] | None) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return collectives.all_to_all(x, group, sent=sent, received=received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return collectives.all_to_all(grad, ctx.group, sent=ctx.received, received=ctx.sent), None, None, None


def copy_to_region(x: Tensor, group: Group) -> Tensor:
    """`x` [...] unchanged; its gradient, of which each member computes a part, is summed over the group."""
    return _Copy.apply(x, group) if group.size > 1 else x


def reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """Sum of the members' `x` [...]; the gradient passes unchanged."""
    return _Reduce.apply(x, group) if group.size > 1 else x


def gather_sequence(x: Tensor, group: Group, *, partial_grad: bool) -> Tensor:
    """The members' parts joined: [s/size, ...] -> [s, ...].

    Args:
        x: this member's part of the sequence.
        group: the members.
        partial_grad: True when each member computes a part of the gradient (a column-parallel layer follows), which
            is then summed; False when every member computes the whole gradient, of which it then takes its part.
    """
    return _Gather.apply(x, group, partial_grad) if group.size > 1 else x


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """This member's part of the sum of the members' `x`: [s, ...] -> [s/size, ...]; gradients are joined again."""
    return _ReduceScatter.apply(x, group) if group.size > 1 else x


def gather_last_dim(x: Tensor, group: Group) -> Tensor:
    """The members' columns joined: [..., v/size] -> [..., v]; the whole gradient is expected on every member."""
    return _GatherLast.apply(x, group) if group.size > 1 else x


def all_to_all(x: Tensor, group: Group, *, sent: list[int] | None = None, received: list[int] | None = None) -> Tensor:
    """Rows of every member to every member, see `collectives.all_to_all`; gradients go the way back."""
    return _AllToAll.apply(x, group, sent, received) if group.size > 1 else x
