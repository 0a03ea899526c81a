"""What the rest of the project may know about a device: one narrow interface, one file per device behind it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

FLOAT8: Mapping[torch.dtype, float] = MappingProxyType({torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0})
"""The formats of arXiv:2209.05433 and the largest number of each."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Facts the core may branch on. A new difference between devices becomes a new fact here, never a name test."""

    dtypes: frozenset[torch.dtype]
    """Floating point types that matrix products run in natively."""
    compile_backend: str | None = "inductor"
    """The backend of torch.compile that makes code for the device; None where nothing can be compiled."""
    pinned_memory: bool = False
    """Copies from page-locked host memory are faster and can overlap with computation."""
    float8: Mapping[torch.dtype, float] = field(default_factory=dict)
    """Formats of 8 bits that linear layers can compute with (`--fp8-format`), each with its largest number."""
    vendor_profiler: Callable[[], Callable[[], str]] | None = None
    """Starts the vendor's own profiler; what it returns stops it and says where the trace is. None: there is none."""
    communicator: Callable[[Sequence[Sequence[int]]], ProcessGroup] | None = None
    """See `mpu.groups.Communicator`: for devices that torch's meshes make no groups for, and FSDP2 does not run on.

    Members of such a group can sum and gather, not send to one another. None: meshes have all that is needed."""


@dataclass(frozen=True)
class EnvVar:
    """An environment variable the device wants. The user's own value always wins."""

    name: str
    value: str
    why: str


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """Memory in bytes: held by tensors, and reserved from the device by the allocator; now and at the peak."""

    allocated: int
    max_allocated: int
    reserved: int
    max_reserved: int


class Accelerator(Protocol):
    """One kind of device. The names are attributes; everything that touches the device is a method."""

    @property
    def name(self) -> str:
        """What `--device` calls it."""

    @property
    def torch_device_type(self) -> str:
        """The `type` of its `torch.device`."""

    @property
    def collective_backend(self) -> str:
        """The backend for `torch.distributed.init_process_group`."""

    @property
    def deepspeed_name(self) -> str | None:
        """The value of `DS_ACCELERATOR` that means this device, or None when DeepSpeed does not know it."""

    @property
    def ops_module(self) -> str:
        """Dotted name of the module with this device's kernels."""

    @property
    def capabilities(self) -> Capabilities:
        """Facts the core may branch on."""

    @property
    def environment(self) -> tuple[EnvVar, ...]:
        """Variables to set before torch is imported, where the user has not set them."""

    def unavailable_reason(self) -> str:
        """Why this device cannot be used here, as a sentence; empty when it can."""

    def is_available(self) -> bool:
        """Whether this process can use the device."""

    def device_count(self) -> int:
        """Devices this process can see."""

    def set_device(self, local_rank: int) -> torch.device:
        """Make device number `local_rank` of this node the current one. Raises ValueError if there is none."""

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""

    def end_of_micro_step(self) -> None:
        """Called after every forward and backward of a micro-batch; cuts the graph of lazy runtimes."""

    def manual_seed(self, seed: int) -> None:
        """Seed the default generator of the current device."""

    def memory_stats(self) -> MemoryStats:
        """Memory use of the current device."""

    def reset_peak_memory(self) -> None:
        """Start the peaks of `memory_stats` anew."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Peak FLOP/s of dense matrix products in `dtype`; None when not known."""

    def device_description(self) -> str:
        """The device in words, for the start-up log."""


class UnavailableDeviceError(ValueError):
    """A device was asked for that is unknown, or that this machine does not have."""


def host_threads(processes_per_node: int) -> EnvVar:
    """The share of this machine's cores for each of `processes_per_node` processes, as `OMP_NUM_THREADS`.

    Launchers otherwise leave every process with all cores (slow by contention) or with one (slow by idleness).
    """
    if processes_per_node < 1:
        raise ValueError(f"processes per node must be at least 1, not {processes_per_node}")
    threads = max(1, usable_cores() // processes_per_node)
    return EnvVar("OMP_NUM_THREADS", str(threads), f"{usable_cores()} cores shared by {processes_per_node} processes")


def usable_cores() -> int:
    """Cores this process may run on, which containers and `taskset` make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
