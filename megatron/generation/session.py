"""The ranks that generate together: device, kernels and groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

from megatron.accelerators import select
from megatron.mpu.groups import ProcessGroups, build_groups, check_sums_suffice
from megatron.mpu.topology import Topology
from megatron.ops import Ops, build_table
from megatron.training.setup import SetupError, join

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Session:
    """What a rank computes with."""

    device: torch.device
    ops: Ops
    groups: ProcessGroups


def rank_of(env: Mapping[str, str]) -> int:
    """Number of this process; 0 without a launcher."""
    return int(env.get("RANK", "0"))


def start(device: str, *, tp: int, pp: int, env: Mapping[str, str]) -> Session:
    """Choose the device and join the other ranks.

    Args:
        device: as in `--device`.
        tp, pp: tensor-parallel ranks and pipeline stages.
        env: what a launcher says (RANK, WORLD_SIZE, LOCAL_RANK).

    Raises:
        SetupError: there are more or fewer processes than `tp` times `pp`.
    """
    world = int(env.get("WORLD_SIZE", "1"))
    if min(tp, pp) < 1 or tp * pp != world:
        raise SetupError(
            f"--tensor-model-parallel-size {tp} times --pipeline-model-parallel-size {pp} must be the number of "
            f"processes, which is {world}" + ("" if world > 1 else " (torchrun --nproc-per-node N starts more)")
        )
    accelerator = select(device)
    ops, _ = build_table(accelerator, {})
    chosen = accelerator.set_device(int(env.get("LOCAL_RANK", "0")))
    if world > 1:
        join(accelerator.collective_backend, env, _TIMEOUT)
    topology, communicator = Topology(world, tp=tp, pp=pp), accelerator.capabilities.communicator
    if communicator is not None:
        check_sums_suffice(topology)
    groups = build_groups(topology, accelerator.torch_device_type, communicator=communicator)
    return Session(chosen, ops, groups)
