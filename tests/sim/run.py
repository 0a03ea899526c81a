"""Runs functions on simulated devices, each call in processes of its own: a process can have one kind of device."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sim import build
from tests.sim.build import Device
from tests.support import run_ranks

DEVICES: tuple[Device, ...] = ("hpu", "npu", "neuron")
VENDOR_PACKAGE: Mapping[Device, str] = {
    "hpu": "habana_frameworks.torch",
    "npu": "torch_npu",
    "neuron": "torch_neuronx",
}
_SETTINGS: Mapping[Device, Mapping[str, str]] = {
    "hpu": {"PT_HPU_LAZY_MODE": "0"},
    "npu": {"ASCEND_HOME_PATH": "/usr/local/Ascend"},  # set_env.sh of the vendor's toolkit; DeepSpeed reads it
    "neuron": {},
}
BACKEND: Mapping[Device, str] = {"hpu": "hccl", "npu": "hccl", "neuron": "neuron"}
_HERE = Path(__file__).parent


def need(device: Device) -> None:
    """Compile the device if need be; skip the test where that cannot be done.

    There must be a compiler, and for Gaudi a torch like the vendor's: with one that is built for CUDA, even without a
    GPU, torch ends a backward pass with "Cannot have both HPU and cuda".
    """
    if build.dispatch_key(device) == "hpu" and torch.version.cuda is not None:
        pytest.skip(f"the simulated {device} needs a torch without CUDA (the CPU build), not {torch.__version__}")
    if not build.library(device).exists() and build.compiler() is None:
        pytest.skip(f"the simulated {device} needs a C++ compiler: {os.environ.get('CXX', 'g++')} was not found")
    build.ensure(device)


def environment(device: Device) -> dict[str, str]:
    """Variables for a program that is to find the simulated device and its vendor's faked package."""
    paths = [str(_HERE / device), str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path), **_SETTINGS[device]}


def run_on_sim(
    device: Device,
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 180.0,
    join: bool = True,
) -> list[Any]:
    """Call `function(*args)` on `world_size` processes with a simulated device each; results in rank order.

    The vendor's faked package is imported, the device of the process is set, and with several ranks torch.distributed
    is initialised with the device's own backend. What the function returns travels to this process, as tensors cannot.

    Args:
        device: the kind of device.
        function: importable, at module level.
        args: of the function; picklable.
        world_size: number of processes.
        env: further environment variables, such as PT_HPU_LAZY_MODE.
        timeout: seconds until the processes are given up.
        join: whether several ranks join each other; otherwise the function does it.
    """
    need(device)
    variables = {**_SETTINGS[device], **(env or {})}
    return run_ranks(world_size, _on_device, device, join, function, args, timeout=timeout, env=variables, init=False)


def _on_device(device: Device, join: bool, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    sys.path.insert(0, str(_HERE / device))
    importlib.import_module(VENDOR_PACKAGE[device])
    import torch
    import torch.distributed as dist

    torch.get_device_module(device).set_device(int(os.environ["LOCAL_RANK"]))
    if join and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group(BACKEND[device])
    return function(*args)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What happened on the device within `counted`.

    Attributes:
        kernels: operator -> calls that computed with device tensors ("aten::mm.out", "npu::npu_rms_norm").
        host_reads: operator -> calls after which the host waits for a value of the device (`.item()`, `nonzero`).
        to_device, to_host: number of copies of tensors between host and device.
        collectives: collective -> calls.
        events: what the faked packages count: "mark_step", "compile".
        new_signatures: combinations of operator, shapes, dtypes and numbers that had not been seen in this process.
    """

    kernels: dict[str, int]
    host_reads: dict[str, int]
    to_device: int
    to_host: int
    collectives: dict[str, int]
    events: dict[str, int]
    new_signatures: int

    @classmethod
    def of(cls, counters: Mapping[str, Any], signatures_before: int = 0) -> Counts:
        """From the counters of the device's library."""
        names = ("kernels", "host_reads", "to_device", "to_host", "collectives", "events")
        return cls(
            **{name: counters[name] for name in names}, new_signatures=counters["signatures"] - signatures_before
        )

    def vendor(self) -> dict[str, int]:
        """Calls of the vendor's own operators, by their name without the namespace."""
        return {name.partition("::")[2]: n for name, n in self.kernels.items() if not name.startswith("aten::")}

    def torch_operators(self) -> set[str]:
        """Names of torch's operators that computed, as `snapshot.base_names` writes them."""
        from tests.sim.snapshot import base_names

        return set(base_names(name.removeprefix("aten::") for name in self.kernels if name.startswith("aten::")))


@contextlib.contextmanager
def counted(device: Device) -> Iterator[Callable[[], Counts]]:
    """Count what happens on the device; calling what it yields gives the counts so far."""
    from tests.sim import runtime

    sim = runtime.library(device)
    before = sim.counters()["signatures"]
    sim.reset_counters()

    yield lambda: Counts.of(sim.counters(), before)
