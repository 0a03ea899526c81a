"""AWS Trainium 2 and 3 through the native `torch_neuronx` (2.13 and later): an ordinary torch device, no XLA.

Operations are compiled one by one and cached by their shapes, so shapes must not change from step to step.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from megatron.accelerators.base import Accelerator, Capabilities, EnvVar, MemoryStats
from megatron.accelerators.vendor import NO_AUTOLOAD, check_local_rank, import_problem

_PACKAGE = "torch_neuronx"
_CORES = "NEURON_LOGICAL_NC_CONFIG"

# Dense FLOP/s of one physical core, from the architecture pages of the AWS Neuron documentation (a chip has 8 cores).
CORE_PEAK = {
    ("trn2", torch.bfloat16): 667e12 / 8,
    ("trn2", torch.float16): 667e12 / 8,
    ("trn2", torch.float32): 181e12 / 8,
    ("trn3", torch.bfloat16): 671e12 / 8,
    ("trn3", torch.float16): 671e12 / 8,
    ("trn3", torch.float32): 183e12 / 8,
}
_CORES_PER_DEVICE = 2
"""Physical cores that make up one device by default on these chips."""


@dataclass(frozen=True)
class Neuron:
    """AWS Trainium 2 and 3: one logical core per process."""

    name: str = "neuron"
    torch_device_type: str = "neuron"
    collective_backend: str = "neuron"
    deepspeed_name: str | None = None
    ops_module: str = "megatron.ops.neuron"
    environment: tuple[EnvVar, ...] = (NO_AUTOLOAD,)

    @property
    def capabilities(self) -> Capabilities:
        """No float64 matrix products."""
        dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16})
        return Capabilities(dtypes=dtypes, compile_backend="neuron")

    def unavailable_reason(self) -> str:
        """Why no core can be used; empty when one can."""
        problem = import_problem(_PACKAGE)
        if problem:
            return problem
        if not hasattr(torch, "neuron"):
            return "this torch_neuronx is the one for PyTorch/XLA, not the native one: see --device neuron_xla"
        if not _neuron().is_available():
            return "torch_neuronx finds no Trainium core (driver, or NEURON_RT_VISIBLE_CORES)"
        return ""

    def is_available(self) -> bool:
        """Whether the software is installed and sees a core."""
        return not self.unavailable_reason()

    def device_count(self) -> int:
        """Logical cores this process can see; 0 without the software."""
        return 0 if self.unavailable_reason() else int(_neuron().device_count())

    def set_device(self, local_rank: int) -> torch.device:
        """Make core `local_rank` current. Raises ValueError when there is no such core."""
        check_local_rank(local_rank, self.device_count(), "Trainium core", "NEURON_RT_VISIBLE_CORES")
        _neuron().set_device(local_rank)
        return torch.device("neuron", local_rank)

    def synchronize(self) -> None:
        """Wait for all work of the current core."""
        _neuron().synchronize()

    def end_of_micro_step(self) -> None:
        """Nothing to cut: operations are queued when they are called."""

    def manual_seed(self, seed: int) -> None:
        """Seed the generator of the current core."""
        _neuron().manual_seed(seed)

    def memory_stats(self) -> MemoryStats:
        """Figures of the caching allocator, in bytes."""
        import torch_neuronx as memory

        return MemoryStats(
            allocated=memory.memory_allocated(),
            max_allocated=memory.max_memory_allocated(),
            reserved=memory.memory_reserved(),
            max_reserved=memory.max_memory_reserved(),
        )

    def reset_peak_memory(self) -> None:
        """Start the peaks of `memory_stats` anew."""
        import torch_neuronx

        torch_neuronx.reset_peak_memory_stats()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Published figure of the chip, for the physical cores behind one device."""
        cores = int(os.environ.get(_CORES, _CORES_PER_DEVICE))
        return device_peak_flops(self._chip(), dtype, cores)

    def device_description(self) -> str:
        """Chip and how many logical cores of it there are."""
        return f"{self.device_count()} logical cores of {self._chip()}"

    def _chip(self) -> str:
        return str(_neuron().get_device_properties(_neuron().current_device()).name)


def accelerator() -> Accelerator:
    """AWS Trainium through native PyTorch."""
    return Neuron()


def device_peak_flops(chip: str, dtype: torch.dtype, cores: int) -> float | None:
    """Peak dense FLOP/s of `cores` physical cores of a chip such as "trn2"; None for an unknown chip or type."""
    per_core = CORE_PEAK.get((chip[:4].lower(), dtype))
    return None if per_core is None else per_core * cores


def _neuron() -> ModuleType:
    """`torch.neuron`, which torch_neuronx makes."""
    importlib.import_module(_PACKAGE)
    module: ModuleType = torch.get_device_module("neuron")
    return module
