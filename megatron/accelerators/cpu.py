"""Plain CPUs: any torch, gloo collectives, every dtype that torch can multiply."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.accelerators.base import FLOAT8, Accelerator, Capabilities, EnvVar, MemoryStats, usable_cores

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Cpu:
    """The host itself: one device that any number of processes share."""

    name: str = "cpu"
    torch_device_type: str = "cpu"
    collective_backend: str = "gloo"
    deepspeed_name: str | None = "cpu"
    ops_module: str = "megatron.ops.cpu"
    environment: tuple[EnvVar, ...] = (
        EnvVar(
            "TORCH_DEVICE_BACKEND_AUTOLOAD", "0", "an installed vendor package without its driver breaks `import torch`"
        ),
    )

    @property
    def capabilities(self) -> Capabilities:
        """Every dtype works (float16 and 8 bits slowly); gloo's work shares the cores with the computation."""
        dtypes = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
        return Capabilities(dtypes=dtypes, float8=FLOAT8)

    def unavailable_reason(self) -> str:
        """A CPU is always there."""
        return ""

    def is_available(self) -> bool:
        """A CPU is always there."""
        return True

    def device_count(self) -> int:
        """One, whatever the number of cores: processes share it."""
        return 1

    def set_device(self, local_rank: int) -> torch.device:
        """The CPU, for every local rank."""
        if local_rank < 0:
            raise ValueError(f"local rank {local_rank} is negative")
        return torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing to wait for: operations run when they are called."""

    def end_of_micro_step(self) -> None:
        """Nothing to cut: operations run when they are called."""

    def manual_seed(self, seed: int) -> None:
        """Seed the default CPU generator."""
        torch.default_generator.manual_seed(seed)

    def memory_stats(self) -> MemoryStats:
        """Resident memory of this process in bytes; the host has no allocator figures, so reserved equals allocated."""
        peak = _peak_resident_bytes()
        resident = _resident_bytes() or peak
        peak = max(peak, resident)
        return MemoryStats(allocated=resident, max_allocated=peak, reserved=resident, max_reserved=peak)

    def reset_peak_memory(self) -> None:
        """Ask the kernel to forget the peak. Where it cannot, the peak stays that of the process's life."""
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Not known: it depends on cores, clock and instructions that the system does not report reliably."""
        return None

    def device_description(self) -> str:
        """Model name and usable cores."""
        return f"{_model_name()}, {usable_cores()} cores, {torch.get_num_threads()} threads"


def accelerator() -> Accelerator:
    """The CPU."""
    return Cpu()


def _resident_bytes() -> int:
    """Resident set of this process now; 0 where the system does not tell."""
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def _peak_resident_bytes() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _model_name() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
