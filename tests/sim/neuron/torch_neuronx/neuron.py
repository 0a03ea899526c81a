"""SIMULATION of `torch.neuron`."""

from __future__ import annotations

from tests.sim import runtime

globals().update(runtime.device_functions("neuron", "trn2 (simulated)"))
