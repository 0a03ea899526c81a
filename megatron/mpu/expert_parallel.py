"""Expert parallelism: each of the ranks of a group holds some of the experts, and tokens travel to them and back.

The ranks are neighbours in the plane of data- and context-parallel ranks, as in Megatron. Ranks at the same place of
different groups hold the same experts: over them, the expert-data-parallel ranks, gradients of experts are summed.
Legend: h=hidden, E=experts of a layer, e=expert-parallel ranks, m=tokens to experts of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megatron.mpu import collectives
from megatron.mpu.groups import ExpertGroups, Group, ProcessGroups
from megatron.mpu.mappings import all_to_all

MESH_AXES = ("pp", "edp_replicate", "edp_shard", "ep", "tp")
_ALONE = Group(ranks=(0,), rank=0, size=1, handle=None)


def with_experts(groups: ProcessGroups, device_type: str, *, copies: int | None = 1) -> ProcessGroups:
    """Add the groups of the experts, where their number of ranks is above 1. Every rank must call it.

    Args:
        groups: of this process; its topology says how many ranks share the experts.
        device_type: torch device type of the tensors that are communicated.
        copies: of the sharded training state of the experts; None = every rank that holds an expert has all of it.

    Raises:
        ValueError: if the copies do not divide the ranks that hold the same experts.
    """
    topology = groups.topology
    ep = topology.ep
    if ep == 1:
        return groups
    edp = topology.dp * topology.cp // ep
    replicas = edp if copies is None else copies
    if edp % replicas:
        raise ValueError(
            f"--num-distributed-optimizer-instances is {replicas}; it must divide the {edp} ranks that hold the same "
            f"experts (--moe-expert-parallel-size {ep})"
        )
    shape = (topology.pp, replicas, edp // replicas, ep, topology.tp)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=MESH_AXES)
    rank = groups.world.rank
    group = Group(_members(topology.groups("ep"), rank), mesh.get_local_rank("ep"), ep, mesh.get_group("ep"))
    return replace(groups, experts=ExpertGroups(ep=group, edp_size=edp, mesh=mesh))


def _members(groups: Sequence[Sequence[int]], rank: int) -> tuple[int, ...]:
    return tuple(next(ranks for ranks in groups if rank in ranks))


def expert_group(groups: ProcessGroups) -> Group:
    """The ranks that share the experts of a layer among them."""
    return _ALONE if groups.experts is None else groups.experts.ep


@dataclass(frozen=True)
class Journey:
    """Which way tokens go: `out` to the ranks of their experts, `back` where they came from.

    Attributes:
        group: the expert-parallel ranks.
        sent: tokens for each of them.
        received: tokens from each of them.
        order: how the received tokens are sorted by expert: [m] indices; None = they are already.
        counts: tokens of each expert of this rank, int64 [E/e].
    """

    group: Group
    sent: list[int]
    received: list[int]
    order: Tensor | None
    counts: Tensor

    def out(self, rows: Tensor) -> Tensor:
        """Rows sorted by expert [., h] -> the rows for this rank's experts, sorted by expert [m, h]."""
        if self.group.size == 1:
            return rows
        arrived = all_to_all(rows, self.group, sent=self.sent, received=self.received)
        return arrived if self.order is None else arrived.index_select(0, self.order)

    def back(self, rows: Tensor) -> Tensor:
        """The inverse of `out`."""
        if self.group.size == 1:
            return rows
        if self.order is not None:
            rows = rows.index_select(0, _inverse(self.order))
        return all_to_all(rows, self.group, sent=self.received, received=self.sent)


def plan_journey(counts: Tensor, group: Group, *, padded_to: int | None = None) -> Journey:
    """Tell the ranks how many tokens come.

    Args:
        counts: tokens of this rank for each expert, int64 [E].
        group: the expert-parallel ranks.
        padded_to: tokens for each expert on every rank, where that is known: nothing is communicated then, and the
            host need not wait for the device.
    """
    size = group.size
    if size == 1:
        return Journey(group, [], [], None, counts)
    local = counts.numel() // size
    if padded_to is not None:
        lengths = [padded_to * local] * size
        arriving = counts.new_full((size, local), padded_to)
        return Journey(group, lengths, lengths, _by_expert(arriving), arriving.sum(0))
    outgoing = counts.view(size, local)
    arriving = collectives.all_to_all(outgoing, group)
    sent, received = torch.stack((outgoing.sum(1), arriving.sum(1))).tolist()
    return Journey(group, sent, received, _by_expert(arriving), arriving.sum(0))


def _by_expert(arriving: Tensor) -> Tensor | None:
    """Order of tokens that arrive rank by rank, from each `arriving` [e, E/e] for every expert, by expert."""
    size, local = arriving.shape
    if local == 1:
        return None
    experts = torch.arange(local, device=arriving.device).repeat(size).repeat_interleave(arriving.flatten())
    return torch.sort(experts, stable=True).indices


def _inverse(order: Tensor) -> Tensor:
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places


def largest(count: Tensor, group: Group) -> int:
    """The largest of the members' counts (int64 scalar), on the host."""
    return int(collectives.all_reduce(count, group, dist.ReduceOp.MAX).item())
