"""Process groups of one rank, made once from the topology and passed to whoever communicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron.mpu.topology import Place, Topology

MESH_AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Group:
    """The ranks that communicate along one axis, as seen from one of them.

    Attributes:
        ranks: global ranks of the members, in order.
        rank: index of this process among the members.
        size: number of members.
        handle: the communicator; None for a group of one, which never communicates.
    """

    ranks: tuple[int, ...]
    rank: int
    size: int
    handle: dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """Every group this process belongs to.

    Attributes:
        topology: the grid of ranks.
        place: coordinates of this process in it.
        mesh: the same grid for `torch.distributed.tensor` and FSDP, dimensions ("pp", "dp", "cp", "tp");
            None when torch.distributed is not initialised.
        tp, cp, dp, pp: the group along each axis.
        dp_cp: all ranks that hold the same weights: the group over which losses and gradients are summed.
        world: all ranks.
    """

    topology: Topology
    place: Place
    mesh: DeviceMesh | None
    tp: Group
    cp: Group
    dp: Group
    pp: Group
    dp_cp: Group
    world: Group

    def data_parallel_mesh(self) -> DeviceMesh:
        """The one-dimensional mesh of the ranks that hold the same weights (dp x cp), for FSDP.

        Raises:
            RuntimeError: without torch.distributed.
        """
        if self.mesh is None:
            raise RuntimeError("there is no device mesh: torch.distributed was not initialised before build_groups")
        return self.mesh["dp"] if self.cp.size == 1 else self.mesh["dp", "cp"]._flatten("dp_cp")

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Sum of `x` [...] over the ranks that hold the same weights: a new tensor, without gradient."""
        total = x.detach().clone()
        if self.dp_cp.size > 1:
            dist.all_reduce(total, group=self.dp_cp.handle)
        return total


def single_process() -> ProcessGroups:
    """Groups of a process that runs alone and does not need torch.distributed."""
    alone = Group(ranks=(0,), rank=0, size=1, handle=None)
    return ProcessGroups(
        topology=Topology(1),
        place=Place(0, 0, 0, 0),
        mesh=None,
        tp=alone,
        cp=alone,
        dp=alone,
        pp=alone,
        dp_cp=alone,
        world=alone,
    )


def build_groups(topology: Topology, device_type: str) -> ProcessGroups:
    """Create the groups of this process. Every rank must call it, in the same order as other collectives.

    Args:
        topology: the grid of ranks; its world size must be that of torch.distributed.
        device_type: torch device type of the tensors that are communicated.

    Raises:
        ValueError: if the topology is for another number of ranks than there are.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if topology.world_size != world_size:
        raise ValueError(f"the topology has {topology.world_size} ranks, torch.distributed has {world_size}")
    if not dist.is_initialized():
        return single_process()
    shape = tuple(topology.size(axis) for axis in MESH_AXES)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=MESH_AXES)
    rank = dist.get_rank()
    axes = {axis: _group(_ranks_of(topology, rank, axis), rank, mesh.get_group(axis)) for axis in MESH_AXES}
    return ProcessGroups(
        topology=topology,
        place=topology.place(rank),
        mesh=mesh,
        dp_cp=_plane(topology, rank, axes),
        world=_group(list(range(world_size)), rank, dist.group.WORLD),
        **axes,
    )


def _ranks_of(topology: Topology, rank: int, *axes: str) -> list[int]:
    return next(ranks for ranks in topology.groups(*axes) if rank in ranks)


def _group(ranks: list[int], rank: int, handle: dist.ProcessGroup | None) -> Group:
    return Group(tuple(ranks), ranks.index(rank), len(ranks), handle if len(ranks) > 1 else None)


def _plane(topology: Topology, rank: int, axes: dict[str, Group]) -> Group:
    """The dp x cp group; a communicator of its own is only made when both axes are longer than one."""
    if topology.cp == 1:
        return axes["dp"]
    if topology.dp == 1:
        return axes["cp"]
    own: dist.ProcessGroup | None = None
    for ranks in topology.groups("cp", "dp"):
        handle = dist.new_group(ranks)
        own = handle if rank in ranks else own
    return _group(_ranks_of(topology, rank, "cp", "dp"), rank, own)
