"""SIMULATION of torch_xla.runtime."""

from __future__ import annotations

import os

import torch


def device_type() -> str:
    """What PJRT_DEVICE asks for."""
    return os.environ.get("PJRT_DEVICE", "CPU")


def local_device_count() -> int:
    """Cores of this node."""
    return int(torch.get_device_module("neuron").device_count())


def global_ordinal() -> int:
    """This rank, as the launcher's variables say."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Ranks, as counted from the launcher's variables."""
    return int(os.environ.get("WORLD_SIZE", "1"))
