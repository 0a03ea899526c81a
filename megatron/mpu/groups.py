"""Process groups of one rank, made once from the topology and passed to whoever communicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron.mpu.context import SequencePart
from megatron.mpu.topology import AXES, Place, Topology

MESH_AXES = ("pp", "dp_replicate", "dp_shard", "tp")

Communicator = Callable[[Sequence[Sequence[int]]], dist.ProcessGroup]
"""From the ranks of all groups of a kind, which together are all ranks, to the communicator of the own group."""

_AXES_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {axis: (axis,) for axis in ("pp", "tp", "dp", "cp", "ulysses", "ring")} | {"dp_cp": ("dp", "cp"), "world": AXES}
)
"""Groups by name, and the axes of the topology that they span."""


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


@dataclass(frozen=True)
class ExpertGroups:
    """Ranks that share experts, see `mpu.expert_parallel`.

    Attributes:
        ep: the ranks that share the experts of a layer among them.
        edp_size: number of ranks that hold the same experts, for each tensor-parallel rank.
        mesh: all ranks as a grid with the dimensions of `expert_parallel.MESH_AXES`; None without torch.distributed.
    """

    ep: Group
    edp_size: int
    mesh: DeviceMesh | None


@dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """Every group this process belongs to.

    Attributes:
        topology: the grid of ranks.
        place: coordinates of this process in it.
        mesh: the same grid for `torch.distributed.tensor` and FSDP, to which dp and cp are one axis, cut in two in
            another way: between "dp_replicate" ranks gradients are all-reduced, over "dp_shard" ranks the optimizer
            state is sharded (hybrid sharding). None without torch.distributed, or on a device that has no meshes.
        tp, cp, dp, pp: the group along each axis.
        ulysses, ring: the two ways in which cp ranks share a sequence, see `mpu.topology`.
        dp_cp: all ranks that hold the same weights: the group over which losses and gradients are summed.
        world: all ranks.
        experts: groups of the experts where several ranks share them; None where every rank has all.
        kv_copies: tensor-parallel ranks that hold the same key-value heads, where there are more ranks than heads;
            None where every rank has heads of its own.
        kv_mesh: the tensor-parallel ranks as a mesh of ("kv", "kv_copy"), for weights of replicated heads; else None.
        communicator: made the groups, where there is no mesh that has them.
    """

    topology: Topology
    place: Place
    mesh: DeviceMesh | None
    tp: Group
    cp: Group
    dp: Group
    pp: Group
    ulysses: Group
    ring: Group
    dp_cp: Group
    world: Group
    experts: ExpertGroups | None = None
    kv_copies: Group | None = None
    kv_mesh: DeviceMesh | None = None
    communicator: Communicator | None = None

    def data_parallel_mesh(self) -> DeviceMesh:
        """The ranks that hold the same weights (dp x cp) for FSDP: a mesh of (replicas, shards).

        Raises:
            RuntimeError: there is no mesh.
        """
        if self.mesh is None:
            raise RuntimeError("there is no device mesh: torch.distributed was not initialised before build_groups")
        return self.mesh["dp_replicate", "dp_shard"]

    @property
    def sequence_part(self) -> SequencePart:
        """Which tokens of a sequence this process has."""
        return SequencePart(
            ring=self.ring.size, turn=self.ring.rank, ulysses=self.ulysses.size, share=self.ulysses.rank
        )

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Sum of `x` [...] over the ranks that hold the same weights: a new tensor, without gradient."""
        return _sum(x, self.dp_cp)

    def sum_over_pipeline(self, x: Tensor) -> Tensor:
        """Sum of `x` [...] over the pipeline ranks: a new tensor, without gradient."""
        return _sum(x, self.pp)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum of `x` [...] over all ranks: a new tensor, without gradient."""
        return _sum(x, self.world)


def _sum(x: Tensor, group: Group) -> Tensor:
    total = x.detach().clone()
    if group.size > 1:
        dist.all_reduce(total, group=group.handle)
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
        ulysses=alone,
        ring=alone,
        dp_cp=alone,
        world=alone,
    )


def build_groups(
    topology: Topology,
    device_type: str,
    *,
    dp_replicas: int = 1,
    kv_copies: int = 1,
    communicator: Communicator | None = None,
) -> ProcessGroups:
    """Create the groups of this process. Every rank must call it, in the same order as other collectives.

    Args:
        topology: the grid of ranks; its world size must be that of torch.distributed.
        device_type: torch device type of the tensors that are communicated.
        dp_replicas: copies of the sharded training state: length of the mesh axis "dp_replicate".
        kv_copies: tensor-parallel ranks that share each key-value head, see `mpu.sharding.kv_copies`.
        communicator: makes the groups of a device that torch's meshes have none for; there is no mesh then.

    Raises:
        ValueError: if the topology is for another number of ranks than there are, or the copies do not divide the
            ranks that hold the same weights.
    """
    holders = topology.dp * topology.cp
    if holders % dp_replicas:
        raise ValueError(
            f"--num-distributed-optimizer-instances is {dp_replicas}; it must divide the {holders} "
            "data-parallel and context-parallel ranks"
        )
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if topology.world_size != world_size:
        raise ValueError(f"the topology has {topology.world_size} ranks, torch.distributed has {world_size}")
    if not dist.is_initialized():
        return single_process()
    mesh, rank = None, dist.get_rank()
    if communicator is None:
        shape = (topology.pp, dp_replicas, holders // dp_replicas, topology.tp)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=MESH_AXES)
        handles = _mesh_handles(topology, mesh)
    else:
        handles = {name: _make(topology.groups(*axes), communicator) for name, axes in _AXES_OF.items()}
    axes = {name: _group(_ranks_of(topology, rank, *_AXES_OF[name]), rank, handles[name]) for name in handles}
    groups = ProcessGroups(
        topology=topology,
        place=topology.place(rank),
        mesh=mesh,
        communicator=communicator,
        **axes,
    )
    return with_kv_copies(groups, kv_copies)


def with_kv_copies(groups: ProcessGroups, copies: int) -> ProcessGroups:
    """The groups of a model of which `copies` tensor-parallel ranks hold each key-value head. Called by all ranks."""
    if copies == 1:
        return groups
    tp, rank = groups.tp, groups.world.ranks[groups.world.rank]
    # Neighbours, as are the query heads that share a key-value head.
    sharing = [line[at : at + copies] for line in groups.topology.groups("tp") for at in range(0, tp.size, copies)]
    kv_mesh = None
    if groups.communicator is not None:
        handle = groups.communicator(sharing)
    else:
        assert groups.mesh is not None
        kv_mesh = groups.mesh["tp"]._unflatten(0, (tp.size // copies, copies), ("kv", "kv_copy"))
        handle = kv_mesh.get_group("kv_copy")
    own = next(ranks for ranks in sharing if rank in ranks)
    return replace(groups, kv_copies=_group(own, rank, handle), kv_mesh=kv_mesh)


def check_sums_suffice(topology: Topology, zero_stage: int = 0) -> None:
    """Refuse what a device cannot do whose groups have to be made by a `Communicator`.

    Raises:
        ValueError: names every flag that asks for it.
    """
    asked = {
        "--pipeline-model-parallel-size": (topology.pp, 1),
        "--context-parallel-size": (topology.cp // topology.ulysses, 1),
        "--ds-sequence-parallel-size": (topology.ulysses, 1),
        "--moe-expert-parallel-size": (topology.ep, 1),
        "--zero-stage": (zero_stage if topology.dp > 1 else 0, 0),
    }
    wrong = [f"{flag} {allowed} (not {found})" for flag, (found, allowed) in asked.items() if found != allowed]
    if wrong:
        raise ValueError(
            "ranks of this device can sum and gather, but neither send to one another nor share the optimizer's state: "
            f"set {', '.join(wrong)}"
        )


def _ranks_of(topology: Topology, rank: int, *axes: str) -> list[int]:
    return next(ranks for ranks in topology.groups(*axes) if rank in ranks)


def _mesh_handles(topology: Topology, mesh: DeviceMesh) -> dict[str, dist.ProcessGroup | None]:
    """Communicators by the name of the group, of a mesh that has them."""
    own = {axis: mesh.get_group(axis) for axis in ("pp", "tp")}
    return own | _data_handles(topology, mesh) | {"world": dist.group.WORLD}


def _group(ranks: list[int], rank: int, handle: dist.ProcessGroup | None) -> Group:
    return Group(tuple(ranks), ranks.index(rank), len(ranks), handle if len(ranks) > 1 else None)


def _data_handles(topology: Topology, mesh: DeviceMesh) -> dict[str, dist.ProcessGroup | None]:
    """Communicators in the dp x cp plane; where two groups are the same ranks, they share one."""
    plane, cp = _plane_handle(topology, mesh), topology.cp
    own = {"dp_cp": plane}
    own["dp"] = plane if cp == 1 else _make(topology.groups("dp"))
    own["cp"] = plane if topology.dp == 1 else _make(topology.groups("cp"))
    own["ulysses"] = own["cp"] if topology.ulysses == cp else _make(topology.groups("ulysses"))
    own["ring"] = own["cp"] if topology.ulysses == 1 else _make(topology.groups("ring"))
    return own


def _plane_handle(topology: Topology, mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The communicator of the dp x cp plane; one of its own is only made under hybrid sharding."""
    for whole, other in (("dp_shard", "dp_replicate"), ("dp_replicate", "dp_shard")):
        if mesh[other].size() == 1:
            return mesh.get_group(whole)
    return _make(topology.groups("dp", "cp"))


def new_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The `Communicator` of torch.distributed, for its default backend."""
    made = [dist.new_group(list(ranks)) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)


def _make(groups: Sequence[Sequence[int]], make: Communicator = new_group) -> dist.ProcessGroup | None:
    """The communicator of the own one of `groups`; None where nobody has anyone to talk to."""
    return make(groups) if len(groups[0]) > 1 else None
