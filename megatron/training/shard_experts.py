"""How FSDP2 cuts the parameters of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from megatron.model.moe import Experts
from megatron.mpu.groups import ProcessGroups
from megatron.mpu.local import local

_EXPERTS_DIM, _ROWS_DIM = 0, 1


def cut_dim(shape: Sequence[int], shards: int) -> int:
    """Along which dimension a parameter is cut.

    Few ranks would get anything of experts [E, o, i] cut along E where there are more ranks than experts, so their
    rows are cut.

    Args:
        shape: of the parameter, as a rank has it without the cut.
        shards: ranks that it is cut over.
    """
    by_rows = len(shape) == 3 and shape[_EXPERTS_DIM] % shards and not shape[_ROWS_DIM] % shards
    return _ROWS_DIM if by_rows else 0


def placement_over(shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """What tells FSDP2 along which dimension it cuts a parameter over `shards` ranks."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        dim = cut_dim(local(parameter).shape, shards)
        return Shard(dim) if dim else None

    return placement


def sharded_modules(
    blocks: Iterable[nn.Module], model: nn.Module, groups: ProcessGroups
) -> Iterable[tuple[nn.Module, DeviceMesh]]:
    """What FSDP2 gathers and reduces by itself, from the inside out, and over which ranks.

    Experts that several ranks share are modules of their own: their gradients are summed over fewer ranks.

    Args:
        blocks: the layers of the model.
        model: all of it.
        groups: this process's groups; there is a mesh.
    """
    if groups.experts is not None:
        assert groups.experts.mesh is not None
        same = groups.experts.mesh["edp_replicate", "edp_shard"]
        yield from ((module, same) for module in model.modules() if isinstance(module, Experts))
    mesh = groups.data_parallel_mesh()
    yield from ((module, mesh) for module in (*blocks, model))
