"""AWS Trainium 1 through PyTorch/XLA (torch_xla up to 2.9), for machines that the native `neuron` does not serve.

Written to the published interface of torch_xla and never run on a chip. XLA gathers operations into a graph until it is
cut, and compiles a graph anew whenever a shape or a Python number in it changes.

A `DeviceMesh` of torch 2.9 makes no groups for "xla", and FSDP2 asks for streams that "xla" does not have. Groups are
therefore made here, one axis at a time, and know the groups of the other ranks: XLA's collectives name them all.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.accelerators.base import Accelerator, Capabilities, EnvVar, MemoryStats
from megatron.accelerators.vendor import NO_AUTOLOAD, check_local_rank, import_problem

_PACKAGE = "torch_xla"
# Dense FLOP/s of one of the two cores of a chip: the architecture page of the AWS Neuron documentation.
CORE_PEAK = {torch.bfloat16: 95e12, torch.float16: 95e12, torch.float32: 23.75e12}


@dataclass(frozen=True)
class NeuronXla:
    """AWS Trainium 1: one core per process."""

    name: str = "neuron_xla"
    torch_device_type: str = "xla"
    collective_backend: str = "gloo"  # for what is on the host; the device's groups are those of `communicator`
    deepspeed_name: str | None = None
    ops_module: str = "megatron.ops.neuron"
    environment: tuple[EnvVar, ...] = (
        NO_AUTOLOAD,
        EnvVar("PJRT_DEVICE", "NEURON", "torch_xla otherwise looks for other devices first"),
        EnvVar("NEURON_CC_FLAGS", "--model-type=transformer", "lets the compiler optimise for attention"),
        EnvVar("NEURON_FUSE_SOFTMAX", "1", "softmax as one kernel instead of several operations"),
    )

    @property
    def capabilities(self) -> Capabilities:
        """The graph is cut after every micro-step, on all ranks alike, or they wait for each other forever."""
        return Capabilities(
            dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
            compile_backend=None,
            communicator=communicator,
        )

    def unavailable_reason(self) -> str:
        """Why no core can be used; empty when one can."""
        problem = import_problem(_PACKAGE)
        if problem:
            return problem
        try:
            kind = _runtime().device_type()
        except RuntimeError as error:
            return f"torch_xla starts no runtime: {error}"
        if kind != "NEURON":
            return f"torch_xla runs on {kind}, not on NEURON (PJRT_DEVICE)"
        return ""

    def is_available(self) -> bool:
        """Whether the software is installed and sees a core."""
        return not self.unavailable_reason()

    def device_count(self) -> int:
        """Cores of this node; 0 without the software."""
        return 0 if self.unavailable_reason() else int(_runtime().local_device_count())

    def set_device(self, local_rank: int) -> torch.device:
        """The core of this process, which torch_xla chooses by LOCAL_RANK.

        Raises:
            ValueError: there is no such core, or torch_xla numbers the ranks otherwise than the launcher; its
                collectives would then return the local value, or that of others, without a word.
        """
        check_local_rank(local_rank, self.device_count(), "Trainium core", "NEURON_RT_NUM_CORES")
        device: torch.device = _xla().device()
        _model().set_replication(device, [device])  # else torch_xla takes each process for one that is alone
        launched = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        counted = int(_runtime().global_ordinal()), int(_runtime().world_size())
        if launched != counted:
            raise ValueError(
                f"the launcher calls this rank {launched[0]} of {launched[1]}, torch_xla {counted[0]} of {counted[1]}; "
                "start it with torchrun, as megatron.launch does, and see PJRT_DEVICE"
            )
        return device

    def synchronize(self) -> None:
        """Cut the graph and wait until it has run."""
        _xla().sync(wait=True)

    def end_of_micro_step(self) -> None:
        """Cut the graph, so that all micro-steps run the same one."""
        _xla().sync()

    def manual_seed(self, seed: int) -> None:
        """Seed the generator, which is part of the graph."""
        _model().set_rng_state(seed)

    def memory_stats(self) -> MemoryStats:
        """What the runtime reports, in bytes, or zeros; it knows no allocator, so reserved is the whole memory."""
        try:
            info = _model().get_memory_info(_xla().device())
        except RuntimeError:
            return MemoryStats(allocated=0, max_allocated=0, reserved=0, max_reserved=0)
        used, limit = int(info["bytes_used"]), int(info["bytes_limit"])
        peak = int(info.get("peak_bytes_used", used))
        return MemoryStats(allocated=used, max_allocated=peak, reserved=limit, max_reserved=limit)

    def reset_peak_memory(self) -> None:
        """The runtime's peak is that of the process's life."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Published figure of one core."""
        return CORE_PEAK.get(dtype)

    def device_description(self) -> str:
        """How many cores there are."""
        return f"{self.device_count()} cores of trn1 through PyTorch/XLA"


def accelerator() -> Accelerator:
    """AWS Trainium through PyTorch/XLA."""
    return NeuronXla()


def communicator(groups: Sequence[Sequence[int]]) -> ProcessGroup:
    """See `mpu.groups.Communicator`; needs torch.distributed, of any backend."""
    importlib.import_module("torch_xla.distributed.xla_backend")  # which registers itself
    # Not `dist.new_group`, which torch_xla replaces by one that wants everything to be of its backend.
    made: list[Any] = [dist.distributed_c10d.new_group(list(ranks), backend="xla") for ranks in groups]
    own: ProcessGroup = next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
    own._mesh = [list(ranks) for ranks in groups]  # type: ignore[attr-defined]  # as its option "mesh" does
    return own


def _xla() -> ModuleType:
    return importlib.import_module("torch_xla")


def _runtime() -> ModuleType:
    return importlib.import_module("torch_xla.runtime")


def _model() -> ModuleType:
    return importlib.import_module("torch_xla.core.xla_model")
