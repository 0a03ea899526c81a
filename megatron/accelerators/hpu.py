"""Intel Gaudi cards through `habana_frameworks.torch` and its HCCL.

Each process opens one card, chosen by its local rank, and calls it index 0. There are two ways of running: eagerly, and
lazily, where operations are gathered into a graph until the graph is cut (`mark_step`). Lazy mode needs Habana's own
build of torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from megatron.accelerators.base import (
    FLOAT8,
    Accelerator,
    Capabilities,
    EnvVar,
    MemoryStats,
    UnavailableDeviceError,
)
from megatron.accelerators.vendor import NO_AUTOLOAD, check_local_rank, import_problem

_PACKAGE = "habana_frameworks.torch"
_LAZY = "PT_HPU_LAZY_MODE"
PROFILE, PROFILE_ALL = "HABANA_PROFILE", "profile_api_with_nics"
"""The variable that makes the card's software ready for its profiler."""

# Dense bfloat16 FLOP/s: R. Kaplan, "Intel Gaudi 3 AI accelerator", Hot Chips 2024.
PEAK_BFLOAT16 = {"GAUDI3": 1835e12, "GAUDI2": 432e12, "GAUDI": 60e12}


@dataclass(frozen=True)
class Hpu:
    """Intel Gaudi: one card per process."""

    name: str = "hpu"
    torch_device_type: str = "hpu"
    collective_backend: str = "hccl"
    deepspeed_name: str | None = "hpu"
    ops_module: str = "megatron.ops.hpu"

    @property
    def environment(self) -> tuple[EnvVar, ...]:
        """Lazy mode where torch can do it; stacks differ in the default, so it is always said."""
        lazy = _torch_is_habanas()
        why = (
            "Habana's torch gathers operations into graphs: the fastest mode without torch.compile"
            if lazy
            else "torch as published by its project runs on Gaudi eagerly only"
        )
        return (
            NO_AUTOLOAD,
            EnvVar(_LAZY, "1" if lazy else "0", why),
            EnvVar("PT_HPU_LAZY_ACC_PAR_MODE", "0", "graphs are executed as they are cut, as under DeepSpeed"),
            EnvVar("PT_HPU_ENABLE_REFINE_DYNAMIC_SHAPES", "0", "shapes of a training step are static"),
        )

    @property
    def capabilities(self) -> Capabilities:
        """No float64 matrix products; lazy mode wants its graph cut after every micro-step, and no torch.compile."""
        return Capabilities(
            dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
            float8=card_float8("" if import_problem(_PACKAGE) else str(_hpu().get_device_name())),
            vendor_profiler=start_synapse_profiler,
            compile_backend=None if is_lazy() else "hpu_backend",
        )

    def unavailable_reason(self) -> str:
        """Why no Gaudi card can be used; empty when one can."""
        problem = import_problem(_PACKAGE)
        if not problem and not _hpu().is_available():
            return "habana_frameworks finds no Gaudi card (driver, or HABANA_VISIBLE_MODULES)"
        return problem

    def is_available(self) -> bool:
        """Whether the software is installed and sees a card."""
        return not self.unavailable_reason()

    def device_count(self) -> int:
        """Cards of this node; 0 without the software."""
        return 0 if import_problem(_PACKAGE) else int(_hpu().device_count())

    def set_device(self, local_rank: int) -> torch.device:
        """Open card number `local_rank`; this process knows it as index 0. Raises ValueError when there is none."""
        check_local_rank(local_rank, self.device_count(), "Gaudi card", "HABANA_VISIBLE_MODULES")
        _hpu().set_device(local_rank)
        return torch.device("hpu", 0)

    def synchronize(self) -> None:
        """Wait until the card has done all work."""
        _hpu().synchronize()

    def end_of_micro_step(self) -> None:
        """Cut the graph in lazy mode: otherwise it grows over all micro-batches until a value is read."""
        if is_lazy():
            from habana_frameworks.torch import core

            core.mark_step()

    def manual_seed(self, seed: int) -> None:
        """Seed the card's generator."""
        _hpu().manual_seed(seed)

    def memory_stats(self) -> MemoryStats:
        """Figures of the card's allocator in bytes; it reserves the whole card at the start."""
        hpu = _hpu()
        return MemoryStats(
            allocated=hpu.memory_allocated(),
            max_allocated=hpu.max_memory_allocated(),
            reserved=hpu.memory_reserved(),
            max_reserved=hpu.max_memory_reserved(),
        )

    def reset_peak_memory(self) -> None:
        """Start the peaks of `memory_stats` anew."""
        _hpu().reset_peak_memory_stats()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Published figure of the card, for bfloat16 only."""
        return card_peak_flops(str(_hpu().get_device_name()), dtype)

    def device_description(self) -> str:
        """Card, memory and mode."""
        gib = _hpu().memory_reserved() / 2**30
        mode = "lazy" if is_lazy() else "eager"
        return f"{self.device_count()} x {_hpu().get_device_name()}, {gib:.0f} GiB, {mode} mode"


def accelerator() -> Accelerator:
    """Intel Gaudi cards."""
    return Hpu()


def is_lazy() -> bool:
    """Whether operations are gathered into graphs. The vendor's package reads the variable once, as it loads."""
    if import_problem(_PACKAGE):
        return os.environ.get(_LAZY, "0") != "0"
    from habana_frameworks.torch.utils import internal

    return bool(internal.is_lazy())


def card_peak_flops(card_name: str, dtype: torch.dtype) -> float | None:
    """Peak dense FLOP/s of a card by its name, such as "GAUDI2"; None for other types than bfloat16."""
    if dtype != torch.bfloat16:
        return None
    name = card_name.upper().replace(" ", "")
    return next((peak for card, peak in PEAK_BFLOAT16.items() if name.startswith(card)), None)


def card_float8(card_name: str) -> Mapping[torch.dtype, float]:
    """The 8-bit formats of a card by its name; E4M3 of Gaudi 2 has the exponents of IEEE 754 and ends at 240."""
    name = card_name.upper().replace(" ", "")
    if name.startswith("GAUDI3"):
        return FLOAT8
    return {**FLOAT8, torch.float8_e4m3fn: 240.0} if name.startswith("GAUDI2") else {}


def start_synapse_profiler() -> Callable[[], str]:
    """Start Synapse's profiler; what it returns stops it, after the card has done its work.

    Raises:
        UnavailableDeviceError: the software was not told at its start that it will be profiled, or lacks the profiler.
    """
    if not os.environ.get(PROFILE):
        raise UnavailableDeviceError(
            f"--profile hltv: the card's software must be told at its start; export {PROFILE}={PROFILE_ALL}"
        )
    try:
        tools = importlib.import_module("topologies.tools")
    except ImportError as error:
        raise UnavailableDeviceError(f"--profile hltv: topologies.tools, a part of Gaudi's software: {error}") from None
    profiler, everything = tools.SynapseProfilerApi(), tools.TraceType.TraceAll
    profiler.profiler_start(everything, 0)

    def stop() -> str:
        _hpu().synchronize()
        profiler.profiler_stop(everything, 0)
        profiler.profiler_get_trace_json(everything, 0)
        return "a file of Synapse's profiler in the working directory"

    return stop


def _hpu() -> ModuleType:
    """`torch.hpu`, which the vendor's package makes."""
    importlib.import_module(_PACKAGE)
    module: ModuleType = torch.get_device_module("hpu")
    return module


def _torch_is_habanas() -> bool:
    """Versions of Habana's builds of torch end in +git and a commit; there are none without the version."""
    return "+git" in importlib.metadata.version("torch")
