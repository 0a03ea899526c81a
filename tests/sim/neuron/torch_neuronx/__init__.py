"""SIMULATION of the native torch_neuronx for tests. Not Amazon's software.

Importing it gives torch a simulated device "neuron" and a collective backend "neuron". The compiler backend "neuron",
which the real package announces as an entry point, is there after `_compiler.register()`.
"""

from __future__ import annotations

import torch

from tests.sim import runtime
from torch_neuronx import neuron

__version__ = "2.13.3.0+simulation"

runtime.register("neuron", neuron)
runtime.register_collectives("neuron", "neuron", averages=True, not_reduced=frozenset())

memory_allocated = neuron.memory_allocated
max_memory_allocated = neuron.max_memory_allocated
memory_reserved = neuron.memory_reserved
max_memory_reserved = neuron.max_memory_reserved
reset_peak_memory_stats = neuron.reset_peak_memory_stats
torch.Tensor.is_neuron = property(lambda tensor: tensor.device.type == "neuron")
