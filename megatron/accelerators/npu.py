"""Huawei Ascend NPUs through `torch_npu` and HCCL."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from megatron.accelerators.base import Accelerator, Capabilities, EnvVar, MemoryStats
from megatron.accelerators.vendor import NO_AUTOLOAD, check_local_rank, import_problem

_PACKAGE = "torch_npu"


@dataclass(frozen=True)
class Npu:
    """Huawei Ascend: one NPU per process."""

    name: str = "npu"
    torch_device_type: str = "npu"
    collective_backend: str = "hccl"
    deepspeed_name: str | None = "npu"
    ops_module: str = "megatron.ops.npu"
    environment: tuple[EnvVar, ...] = (
        NO_AUTOLOAD,
        EnvVar("HCCL_CONNECT_TIMEOUT", "1200", "ranks that load data at different speeds first meet minutes apart"),
        EnvVar("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "large models otherwise fail by fragmentation"),
        EnvVar("INF_NAN_MODE_ENABLE", "1", "an overflow must show as infinity, or loss scaling does not see it"),
    )

    @property
    def capabilities(self) -> Capabilities:
        """No float64 matrix products, and no collectives of float64 numbers."""
        dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16})
        return Capabilities(dtypes=dtypes, compile_backend="npu")

    def unavailable_reason(self) -> str:
        """Why no NPU can be used; empty when one can."""
        problem = import_problem(_PACKAGE)
        if not problem and not _npu().is_available():
            return "torch_npu finds no NPU (driver, CANN's set_env.sh, or ASCEND_RT_VISIBLE_DEVICES)"
        return problem

    def is_available(self) -> bool:
        """Whether the software is installed and sees an NPU."""
        return not self.unavailable_reason()

    def device_count(self) -> int:
        """NPUs this process can see; 0 without the software."""
        return 0 if import_problem(_PACKAGE) else int(_npu().device_count())

    def set_device(self, local_rank: int) -> torch.device:
        """Make NPU `local_rank` current. Raises ValueError when there is no such NPU."""
        check_local_rank(local_rank, self.device_count(), "NPU", "ASCEND_RT_VISIBLE_DEVICES")
        _npu().set_device(local_rank)
        return torch.device("npu", local_rank)

    def synchronize(self) -> None:
        """Wait for all streams of the current NPU."""
        _npu().synchronize()

    def end_of_micro_step(self) -> None:
        """Nothing to cut: kernels are queued when they are called."""

    def manual_seed(self, seed: int) -> None:
        """Seed the generator of the current NPU."""
        _npu().manual_seed(seed)

    def memory_stats(self) -> MemoryStats:
        """Figures of torch_npu's caching allocator, in bytes."""
        npu = _npu()
        return MemoryStats(
            allocated=npu.memory_allocated(),
            max_allocated=npu.max_memory_allocated(),
            reserved=npu.memory_reserved(),
            max_reserved=npu.max_memory_reserved(),
        )

    def reset_peak_memory(self) -> None:
        """Start the peaks of `memory_stats` anew."""
        _npu().reset_peak_memory_stats()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Not known: chips of one name are sold with different numbers of cores, and no figures go with the names."""
        return None

    def device_description(self) -> str:
        """Chip and memory."""
        properties = _npu().get_device_properties(_npu().current_device())
        gib = properties.total_memory / 2**30
        return f"{self.device_count()} x {properties.name}, {gib:.0f} GiB"


def accelerator() -> Accelerator:
    """Huawei Ascend NPUs."""
    return Npu()


def _npu() -> ModuleType:
    """`torch.npu`, which torch_npu makes."""
    importlib.import_module(_PACKAGE)
    module: ModuleType = torch.get_device_module("npu")
    return module
