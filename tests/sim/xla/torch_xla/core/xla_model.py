"""SIMULATION of torch_xla.core.xla_model: the random state is one integer, as in the real package."""

from __future__ import annotations

from typing import Any

import torch

_SEED = [0]


def set_replication(device: torch.device, devices: list[torch.device]) -> None:
    """In the real package: from now on the processes are ranks of each other."""


def set_rng_state(seed: int, device: Any = None) -> None:
    """Seed the generator."""
    _SEED[0] = seed
    torch.get_device_module("neuron").manual_seed(seed)


def get_rng_state(device: Any = None) -> int:
    """What was set last."""
    return _SEED[0]


def get_memory_info(device: Any = None) -> dict[str, int]:
    """In bytes."""
    module = torch.get_device_module("neuron")
    return {
        "bytes_used": module.memory_allocated(),
        "bytes_limit": module.mem_get_info()[1],
        "peak_bytes_used": module.max_memory_allocated(),
    }
