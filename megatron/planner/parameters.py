"""The parameters of any rank, from the model itself: it is built on the meta device, which holds no numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron.config.architecture import Architecture
from megatron.model.gpt import GPT
from megatron.model.moe import MoE
from megatron.mpu.groups import ExpertGroups, Group, ProcessGroups
from megatron.mpu.pipeline import StageLayout
from megatron.mpu.sharding import kv_copies
from megatron.mpu.topology import Place, Topology
from megatron.ops import reference_ops
from megatron.planner.case import Case
from megatron.training import tied
from megatron.training.shard_experts import cut_dim


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together: one layer, its experts if ranks share them, or all the rest.

    Attributes:
        name: "layers.3", "layers.3.experts", or "rest" for embedding, final norm and head.
        shapes: local shape of each parameter.
        copies: those of them that are copies of parameters of another stage, for which the optimizer keeps nothing.
        experts: they are experts that several ranks share, so that fewer ranks hold the same.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    copies: tuple[tuple[int, ...], ...] = ()
    experts: bool = False

    @property
    def elements(self) -> int:
        """Numbers of all parameters."""
        return sum(_product(shape) for shape in self.shapes)

    def shard(self, ranks: int) -> int:
        """Numbers that one of `ranks` ranks holds when every parameter is cut, with padding."""
        return _share(self.shapes, ranks)

    def optimized(self, ranks: int) -> int:
        """The same without the copies."""
        return _share(self.shapes, ranks) - _share(self.copies, ranks)


def held_share(case: Case, units: Sequence[Unit]) -> int:
    """Numbers that a rank holds of the training state of some units."""
    return sum(unit.shard(shards_of(case, unit)) for unit in units)


def shards_of(case: Case, unit: Unit) -> int:
    """Ranks over which the training state of a unit is cut."""
    return case.shards_of(experts=unit.experts)


def units_of(case: Case, pipeline_rank: int) -> tuple[Unit, ...]:
    """The parameters of the ranks at one place of the pipeline: its layers, then the rest."""
    layers: list[Unit] = []
    rest: list[Unit] = []
    for stage in case.stages.stages_of(pipeline_rank):
        found = _stage(case.arch, case.tp, case.ep, case.stages, stage)
        layers += found[:-1]
        rest.append(found[-1])
    shapes = tuple(shape for unit in rest for shape in unit.shapes)
    return (*layers, Unit("rest", shapes, tuple(shape for unit in rest for shape in unit.copies)))


def build_rank(case: Case, rank: int) -> list[GPT]:
    """The stages of one rank on the meta device, in any world: no other rank and no communication is needed."""
    place = case.topology.place(rank)
    return [
        _meta_model(case.arch, rank_groups(case.topology, rank, case.kv_copies), case.stages, stage)
        for stage in case.stages.stages_of(place.pp)
    ]


def rank_groups(topology: Topology, rank: int, kv_copies: int = 1) -> ProcessGroups:
    """The groups of a rank without a communicator: enough to build a model, not to run it."""
    place = topology.place(rank)

    def along(*axes: str) -> Group:
        members = [place]
        for axis in axes:
            members = [_moved(member, axis, at) for at in range(topology.size(axis)) for member in members]
        ranks = tuple(sorted(topology.rank(member) for member in members))
        return Group(ranks=ranks, rank=ranks.index(rank), size=len(ranks), handle=None)

    everyone, tp = tuple(range(topology.world_size)), along("tp")
    same_head = tp.ranks[tp.rank // kv_copies * kv_copies :][:kv_copies]
    cp, block = along("cp"), topology.ulysses
    dp_cp, ep = along("cp", "dp"), topology.ep
    return ProcessGroups(
        topology=topology,
        place=place,
        mesh=None,
        tp=tp,
        dp=along("dp"),
        cp=cp,
        pp=along("pp"),
        ulysses=_block(cp, block),
        ring=_among(cp, slice(cp.rank % block, None, block)),
        dp_cp=dp_cp,
        world=Group(ranks=everyone, rank=rank, size=len(everyone), handle=None),
        kv_copies=Group(same_head, same_head.index(rank), kv_copies, None) if kv_copies > 1 else None,
        experts=ExpertGroups(_block(dp_cp, ep), dp_cp.size // ep, None) if ep > 1 else None,
    )


def _block(group: Group, size: int) -> Group:
    """This rank's block of neighbouring members of a group."""
    first = group.rank // size * size
    return _among(group, slice(first, first + size))


def _among(group: Group, members: slice) -> Group:
    """Those members of a group, of which this rank is one, as a group."""
    ranks = group.ranks[members]
    return Group(ranks=ranks, rank=ranks.index(group.ranks[group.rank]), size=len(ranks), handle=None)


def _moved(place: Place, axis: str, at: int) -> Place:
    return replace(place, **{axis: at})


@functools.cache
def _stage(arch: Architecture, tp: int, ep: int, stages: StageLayout, stage: int) -> tuple[Unit, ...]:
    """The units of a stage; parameters do not depend on other data-parallel or context-parallel ranks."""
    groups = rank_groups(Topology(tp * ep, tp=tp, ep=ep), 0, kv_copies(arch.num_kv_heads, tp))
    model = _meta_model(arch, groups, stages, stage)
    layers = [unit for number, layer in model.layers.items() for unit in _layer(f"layers.{number}", layer, ep)]
    rest = {name: weight.shape for name, weight in model.named_parameters() if not name.startswith("layers.")}
    copied = arch.tied_embeddings and stage == stages.last > 0
    copies = (tuple(rest[tied.NAME]),) if copied else ()
    return (*layers, Unit("rest", tuple(tuple(shape) for shape in rest.values()), copies))


def _layer(name: str, layer: torch.nn.Module, ep: int) -> Iterator[Unit]:
    """The units of a layer: experts that `ep` ranks share are one of their own."""
    shared: dict[str, torch.Tensor] = {}
    if ep > 1 and isinstance(layer.mlp, MoE):
        shared.update(layer.mlp.experts.named_parameters(prefix="mlp.experts"))
        yield Unit(f"{name}.experts", _shapes(shared.values()), experts=True)
    yield Unit(name, _shapes(weight for key, weight in layer.named_parameters() if key not in shared))


def _meta_model(arch: Architecture, groups: ProcessGroups, stages: StageLayout, stage: int) -> GPT:
    return GPT(
        arch,
        ops=reference_ops(),
        groups=groups,
        layers=stages.layers_of(stage),
        first=stage == 0,
        last=stage == stages.last,
        device=torch.device("meta"),
    )


def _shapes(weights: Iterable[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(weight.shape) for weight in weights)


def _share(shapes: tuple[tuple[int, ...], ...], ranks: int) -> int:
    return sum(_cut(shape, ranks) for shape in shapes)


def _cut(shape: tuple[int, ...], ranks: int) -> int:
    rows = shape[cut_dim(shape, ranks)]
    return -(-rows // ranks) * (_product(shape) // rows)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for length in shape:
        result *= length
    return result
