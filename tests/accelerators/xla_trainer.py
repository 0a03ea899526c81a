"""The trainer where PyTorch/XLA calls its CPU a Trainium core: `test_xla_compilation.py` runs it.

Nothing of the trainer is replaced. Where there are several processes, neither is anything of torch_xla's process
groups: the three collectives of XLA under them, which its CPU cannot run between processes, go through the host, among
the replica groups that they are given.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch_xla.core.xla_model as xm
import torch_xla.runtime

from megatron.mpu.groups import new_group
from megatron.training.failures import run_to_exit
from pretrain_gpt import main

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
OPERATIONS = {xm.REDUCE_SUM: dist.ReduceOp.SUM, xm.REDUCE_MAX: dist.ReduceOp.MAX}


@functools.cache
def _on_host(replicas: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup:
    """The group of this rank among all `replicas`, which XLA asks to be those of all ranks."""
    assert sorted(rank for ranks in replicas for rank in ranks) == list(range(WORLD)), replicas
    return new_group(replicas)


def _group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    return _on_host(tuple(map(tuple, groups)))


@torch.no_grad()
def all_reduce(kind: str, inputs: list[torch.Tensor], groups: Any, **_: Any) -> list[torch.Tensor]:
    """As torch_xla's with a list: in place."""
    for tensor in inputs:
        total = tensor.cpu()
        dist.all_reduce(total, op=OPERATIONS[kind], group=_group(groups))
        tensor.copy_(total)
    return inputs


@torch.no_grad()
def all_gather(value: torch.Tensor, dim: int, groups: Any, **_: Any) -> torch.Tensor:
    """As torch_xla's: the members' tensors one behind the other."""
    own = value.cpu().contiguous()
    parts = [torch.empty_like(own) for _ in groups[0]]
    dist.all_gather(parts, own, group=_group(groups))
    return torch.cat(parts, dim).to(value.device)


@torch.no_grad()
def reduce_scatter(
    kind: str, value: torch.Tensor, scatter_dim: int, shard_count: int, groups: Any, output: torch.Tensor, **_: Any
) -> torch.Tensor:
    """As torch_xla's: this member's part of the sum, into `output`."""
    total = value.cpu().contiguous()
    dist.all_reduce(total, op=OPERATIONS[kind], group=_group(groups))
    output.copy_(total.chunk(shard_count, scatter_dim)[dist.get_rank(_group(groups))])
    return output


if __name__ == "__main__":
    torch_xla.runtime.device_type = lambda: "NEURON"
    if WORLD > 1:
        torch_xla.runtime.global_ordinal, torch_xla.runtime.world_size = lambda: RANK, lambda: WORLD
        torch_xla.runtime.local_device_count = lambda: WORLD
        xm.all_reduce, xm.all_gather, xm.reduce_scatter = all_reduce, all_gather, reduce_scatter
    run_to_exit(main)
