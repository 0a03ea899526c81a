"""Collectives on plain tensors: no autograd, inputs never changed, a group of one is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu.groups import Group

# torch 2.13 renamed these and deprecated the older names; the older ones are all there is before.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX


class Pending:
    """A tensor that a collective is still filling; `wait()` returns it complete.

    Args:
        result: the tensor being filled.
        work: handle of the running collective; None when the result is complete already.
        source: input of the collective, kept alive until it has been read.
    """

    def __init__(self, result: Tensor, work: Any = None, source: Tensor | None = None) -> None:
        self._result, self._work, self._source = result, work, source

    def wait(self) -> Tensor:
        """Block (the host or the device's stream) until the result is there."""
        if self._work is not None:
            self._work.wait()
        self._work = self._source = None
        return self._result


def start_all_reduce(x: Tensor, group: Group, op: Any = SUM) -> Pending:
    """Sum (or other `op`) of `x` [...] over the group, same shape, in the background."""
    if group.size == 1:
        return Pending(x)
    return start_all_reduce_(x.clone(memory_format=torch.contiguous_format), group, op)


def start_all_reduce_(x: Tensor, group: Group, op: Any = SUM) -> Pending:
    """Like `start_all_reduce`, but overwrites `x`, a contiguous tensor that the caller has just made."""
    if group.size == 1:
        return Pending(x)
    return Pending(x, dist.all_reduce(x, op=op, group=group.handle, async_op=True))


def start_all_gather(x: Tensor, group: Group) -> Pending:
    """The members' `x` [s/size, ...] joined along dimension 0: [s, ...], in the background."""
    if group.size == 1:
        return Pending(x)
    x = x.contiguous()
    result = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    return Pending(result, _all_gather_flat(result, x, group=group.handle, async_op=True), x)


def start_reduce_scatter(x: Tensor, group: Group) -> Pending:
    """This member's part, cut along dimension 0, of the sum of the members' `x`: [s, ...] -> [s/size, ...].

    Raises:
        ValueError: if dimension 0 cannot be divided by the group's size.
    """
    if group.size == 1:
        return Pending(x)
    x = x.contiguous()
    result = x.new_empty((_part(x.shape[0], group), *x.shape[1:]))
    return Pending(result, _reduce_scatter_flat(result, x, op=SUM, group=group.handle, async_op=True), x)


def all_to_all(x: Tensor, group: Group, *, sent: list[int] | None = None, received: list[int] | None = None) -> Tensor:
    """Rows of `x` [s, ...] to every member, and the rows that members sent here, in the members' order.

    Args:
        x: the rows for the first member, then those for the second, ...
        group: the members.
        sent: rows for each member; None = equally many.
        received: rows from each member; None = equally many.
    """
    x = x.contiguous()
    result = x.new_empty((x.shape[0] if received is None else sum(received), *x.shape[1:]))
    dist.all_to_all_single(result, x, output_split_sizes=received, input_split_sizes=sent, group=group.handle)
    return result


def start_send(x: Tensor, group: Group, member: int) -> Pending:
    """Send `x` [...] to another member, in the background. Transfers between two members arrive in order."""
    x = x.contiguous()
    return Pending(x, dist.isend(x, dst=group.ranks[member], group=group.handle))


def start_receive(buffer: Tensor, group: Group, member: int) -> Pending:
    """Fill `buffer` [...] with what another member sends, in the background."""
    return Pending(buffer, dist.irecv(buffer, src=group.ranks[member], group=group.handle))


def start_exchange(x: Tensor, group: Group, *, to: int, source: int) -> Pending:
    """Send `x` [...] to one member and get as much from another, in the background and at once.

    A send and a receive after each other would wait for each other where a backend works them off in order.
    """
    x = x.contiguous()
    result = torch.empty_like(x)
    transfers = [
        dist.P2POp(dist.isend, x, group.ranks[to], group.handle),
        dist.P2POp(dist.irecv, result, group.ranks[source], group.handle),
    ]
    return Pending(result, _All(dist.batch_isend_irecv(transfers)), x)


class _All:
    """Several running transfers as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def all_reduce(x: Tensor, group: Group, op: Any = SUM) -> Tensor:
    """Sum (or other `op`) of `x` [...] over the group: a new tensor, or `x` itself in a group of one."""
    return start_all_reduce(x, group, op).wait()


def all_gather(x: Tensor, group: Group) -> Tensor:
    """The members' `x` [s/size, ...] joined along dimension 0: [s, ...]."""
    return start_all_gather(x, group).wait()


def broadcast(x: Tensor, group: Group, member: int) -> Tensor:
    """What `x` [...] is on one member, on all of them; elsewhere `x`, which must be contiguous, is overwritten."""
    if group.size > 1:
        dist.broadcast(x, src=group.ranks[member], group=group.handle)
    return x


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """This member's part along dimension 0 of the sum of the members' `x`: [s, ...] -> [s/size, ...]."""
    return start_reduce_scatter(x, group).wait()


def own_part(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """This member's part of `x`, cut evenly along `dim`; a view. Raises ValueError if it cannot be cut evenly."""
    length = _part(x.shape[dim], group)
    return x.narrow(dim, group.rank * length, length)


def _part(length: int, group: Group) -> int:
    if length % group.size:
        raise ValueError(
            f"a dimension of {length} cannot be divided over {group.size} ranks; choose --seq-length and "
            f"--tensor-model-parallel-size so that it can"
        )
    return length // group.size
