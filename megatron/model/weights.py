"""Initial weights, and the conversion of local tensors to DTensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron.config.architecture import Architecture
from megatron.mpu.expert_parallel import expert_group
from megatron.mpu.groups import Group, ProcessGroups
from megatron.mpu.init import Distribution, draw, xavier_uniform
from megatron.mpu.sharding import is_expert, is_replicated_kv, local_slice, logical_shape, shard_dim


def distribution(name: str, shape: tuple[int, ...], arch: Architecture) -> Distribution:
    """How a parameter is drawn: Megatron's rules.

    Weights are normal(0, init_std); those that write to the residual stream (attention.output, mlp.down) have
    init_std / sqrt(2 * layers). With xavier_uniform all matrices are uniform. Norms start as the identity, biases at 0.

    Args:
        name: logical parameter name.
        shape: logical shape; of one expert where there are several.
        arch: the architecture.
    """
    parts = name.split(".")
    if parts[-1] == "bias":
        return Distribution(kind="constant", scale=0.0)
    if parts[-2].endswith("norm"):
        return Distribution(kind="constant", scale=0.0 if arch.norm_1p else 1.0)
    is_embedding = parts[0] == "embedding"
    if is_embedding and arch.embedding_init_std is not None:
        return Distribution(kind="normal", scale=arch.embedding_init_std)
    if arch.init_method == "xavier_uniform":
        # Padding of the vocabulary depends on the layout, the bound must not.
        is_vocabulary = name in ("embedding.word.weight", "head.weight")
        return xavier_uniform(arch.vocab_size if is_vocabulary else shape[0], shape[1])
    if name.endswith((".attention.output.weight", ".down.weight")):
        return Distribution(kind="normal", scale=arch.init_std / math.sqrt(2.0 * arch.num_layers))
    return Distribution(kind="normal", scale=arch.init_std)


def initialise_parameters(model: nn.Module, arch: Architecture, groups: ProcessGroups, seed: int) -> None:
    """Write the initial weights of this rank, the same numbers for every layout; see `mpu.init`.

    Args:
        model: see `fill_parameters`.
        arch: the architecture.
        groups: this process's groups.
        seed: of the run.
    """

    def part(name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
        if not is_expert(name):
            return draw(name, shape, index, distribution(name, shape, arch), seed=seed)
        experts, *rest = index
        kind = distribution(name, shape[1:], arch)
        numbers = range(experts.start, experts.stop)
        return torch.stack([draw(f"{name}.{number}", shape[1:], rest, kind, seed=seed) for number in numbers])

    fill_parameters(model, groups, part)


def fill_parameters(
    model: nn.Module, groups: ProcessGroups, part: Callable[[str, tuple[int, ...], tuple[slice, ...]], Tensor]
) -> None:
    """Write the parameters of this rank.

    Args:
        model: a model or stage whose parameters, named logically, are materialised local tensors or DTensors; a DTensor
            may be split further by FSDP along dimension 0, and then only the rows this rank owns are written.
        groups: this process's groups.
        part: from logical name, logical shape and an index into it to what is there, in any floating-point dtype.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                shape, target = tuple(parameter.shape), parameter.to_local()
                index = _own_rows(parameter, _own_part(name, shape, groups))
            else:
                target = parameter.data
                shape, index = place_of(name, target.shape, groups)
            if target.numel():
                target.copy_(part(name, shape, index))


def place_of(
    name: str, local_shape: Sequence[int], groups: ProcessGroups
) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """Logical shape of a parameter, and the index of the part that is this rank's local tensor.

    Args:
        name: logical name.
        local_shape: of the local tensor, which the data-parallel ranks do not split.
        groups: this process's groups.
    """
    shape = logical_shape(name, local_shape, groups.tp.size, _kv_copies(groups))
    if is_expert(name):
        shape = (shape[0] * expert_group(groups).size, *shape[1:])
    return shape, _own_part(name, shape, groups)


def holders(name: str, groups: ProcessGroups) -> int:
    """Ranks of a pipeline stage that hold the same part of a parameter, if data-parallel ranks do not split it."""
    ranks, copies = groups.dp_cp.size, _kv_copies(groups)
    if is_replicated_kv(name, copies):
        ranks *= copies
    elif shard_dim(name) is None:
        ranks *= groups.tp.size
    return ranks // expert_group(groups).size if is_expert(name) else ranks


def _own_part(name: str, shape: tuple[int, ...], groups: ProcessGroups) -> tuple[slice, ...]:
    index = local_slice(name, shape, groups.tp.rank, groups.tp.size, _kv_copies(groups))
    return _own_experts(shape, index, expert_group(groups)) if is_expert(name) else index


def _own_experts(shape: tuple[int, ...], index: tuple[slice, ...], group: Group) -> tuple[slice, ...]:
    """The index into a tensor of experts narrowed to those of this expert-parallel rank."""
    own = shape[0] // group.size
    return (slice(group.rank * own, (group.rank + 1) * own), *index[1:])


def _kv_copies(groups: ProcessGroups) -> int:
    return groups.kv_copies.size if groups.kv_copies else 1


def _own_rows(parameter: DTensor, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """Narrow this rank's part to what FSDP left of it (cut like `torch.chunk`, mostly in rows)."""
    mesh = parameter.device_mesh
    narrowed = list(index)
    for at, placement in enumerate(parameter.placements):
        if (mesh.mesh_dim_names or ())[at] in ("tp", "kv", "ep") or placement.is_replicate():
            continue
        dim: int = getattr(placement, "dim", 0)
        rows = narrowed[dim]
        size = -(-(rows.stop - rows.start) // mesh.size(at))
        start = min(rows.start + size * mesh.get_local_rank(at), rows.stop)
        narrowed[dim] = slice(start, min(start + size, rows.stop))
    return tuple(narrowed)


def experts_to_dtensors(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replace the parameters of experts by DTensors that know how they are split; to be called before `to_dtensors`.

    Args:
        model: its parameters, named logically, are local tensors (also on the meta device).
        mesh: of `ExpertGroups`.
    """
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}"
            if is_expert(full_name):
                dim = shard_dim(full_name)
                placements = [Shard(0), Replicate() if dim is None else Shard(dim)]
                whole = DTensor.from_local(parameter.data, mesh["ep", "tp"], placements, run_check=False)
                setattr(module, name, nn.Parameter(whole))


def to_dtensors(model: nn.Module, mesh: DeviceMesh, kv_mesh: DeviceMesh | None = None) -> None:
    """Replace every parameter by a DTensor that knows how it is split over the tensor-parallel ranks.

    Args:
        model: its parameters, named logically, are local tensors (also on the meta device).
        mesh: the mesh of all ranks, with a dimension "tp".
        kv_mesh: of replicated key-value heads, see `ProcessGroups`.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            if parameter not in replaced:
                full_name = f"{prefix}.{name}" if prefix else name
                replaced[parameter] = nn.Parameter(_to_dtensor(full_name, parameter.data, mesh["tp"], kv_mesh))
            setattr(module, name, replaced[parameter])


def _to_dtensor(name: str, part: Tensor, tp_mesh: DeviceMesh, kv_mesh: DeviceMesh | None) -> DTensor:
    dim = shard_dim(name)
    placement = Replicate() if dim is None else Shard(dim)
    if kv_mesh is not None and is_replicated_kv(name, kv_mesh.size(1)):
        return DTensor.from_local(part, kv_mesh, [placement, Replicate()], run_check=False)
    return DTensor.from_local(part, tp_mesh, [placement], run_check=False)
