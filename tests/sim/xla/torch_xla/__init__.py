"""SIMULATION of torch_xla for Trainium 1 on the simulated device "neuron": eager, though it counts the cuts of graphs.

Its device should be called "xla". torch does not let that name be given to a device that is not PyTorch/XLA's own.
"""

from __future__ import annotations

import os

import torch
import torch_neuronx  # noqa: F401 - makes the device

from tests.sim import runtime as simulation

__version__ = "2.9.0+simulation"


def device(index: int | None = None) -> torch.device:
    """The core of this process."""
    number = int(os.environ.get("LOCAL_RANK", "0")) if index is None else index
    torch.get_device_module("neuron").set_device(number)
    return torch.device("neuron", number)


def sync(wait: bool = False, reset_scope: bool = True) -> None:
    """In the real package: cut the graph and run it."""
    simulation.library("neuron").count_event("sync")
