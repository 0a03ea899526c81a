"""SIMULATION of the native torch_neuronx for tests. Not Amazon's software.

Importing it gives torch a simulated device "neuron", a collective backend "neuron" and a compiler backend "neuron".
"""

from __future__ import annotations

import torch

from tests.sim import runtime
from torch_neuronx import _compiler, neuron

__version__ = "2.13.3.0+simulation"

runtime.register("neuron", neuron)
runtime.register_collectives("neuron", "neuron", averages=True, not_reduced=frozenset({"Double"}))
_compiler.register()

memory_allocated = neuron.memory_allocated
max_memory_allocated = neuron.max_memory_allocated
memory_reserved = neuron.memory_reserved
max_memory_reserved = neuron.max_memory_reserved
reset_peak_memory_stats = neuron.reset_peak_memory_stats
torch.Tensor.is_neuron = property(lambda tensor: tensor.device.type == "neuron")
