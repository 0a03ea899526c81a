"""SIMULATION of habana_frameworks.torch.distributed.hccl: registers the backend and chooses the card by LOCAL_RANK."""

from __future__ import annotations

import os

from tests.sim import runtime


def initialize_distributed_hpu(
    world_size: int | None = None, rank: int | None = None, local_rank: int | None = None
) -> tuple[int, int, int]:
    """World size, rank and local rank, from the arguments or the environment; sets HLS_MODULE_ID."""
    if world_size is not None and rank is not None and local_rank is not None:
        os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(local_rank))
    names = (("WORLD_SIZE", 1), ("RANK", -1), ("LOCAL_RANK", -1))
    size, number, local = (int(os.environ.get(name, default)) for name, default in names)
    if local >= 0 and size > 1:
        os.environ.setdefault("HLS_MODULE_ID", str(local))
    return size, number, local


initialize_distributed_hpu()
# The real one knows SUM, PRODUCT, MIN and MAX.
runtime.register_collectives("hpu", "hccl", averages=False, not_reduced=frozenset())
