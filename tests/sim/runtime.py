"""What the faked vendor packages stand on: the simulated device's library, and a `torch.<device>` module over it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.sim import build
from tests.sim.build import Device

MEMORY_BYTES = 64 * 2**30
"""What a simulated device says it has; nothing is refused for lack of it."""
REPORT = "SIM_REPORT"
"""Variable that names the folder in which every rank of a launched program leaves its counters, as rank_<n>.json."""


@functools.cache
def library(device: Device) -> ModuleType:
    """The compiled device, loaded once; there can be one kind per process."""
    path = build.library(device)
    if not path.exists():
        raise RuntimeError(f"the simulated {device} is not built: python -m tests.sim.build {device}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def register(device: Device, module: ModuleType) -> None:
    """Give torch the device under its name, with `module` as `torch.<device>`, and tensors their `.<device>()`."""
    library(device)
    if device != "hpu":
        torch.utils.rename_privateuse1_backend(device)
    torch._register_device_module(device, module)
    if device != "hpu":
        torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    if REPORT in os.environ and "RANK" in os.environ:
        _report_at_exit(device, Path(os.environ[REPORT]))


def _report_at_exit(device: Device, folder: Path) -> None:
    """Write the counters as the process ends, which trainers do by `os._exit`: without any clean-up."""
    leave = os._exit

    def report_and_leave(code: int) -> None:
        (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(library(device).counters()))
        leave(code)

    os._exit = report_and_leave


class Communicator(NamedTuple):
    """A group's backend on the device, and the backend on the host that carries it out."""

    backend: Any
    host: dist.ProcessGroupGloo


def register_collectives(
    device: Device, name: str, *, averages: bool, not_reduced: frozenset[str]
) -> dict[str, Communicator]:
    """Make `name` a backend of torch.distributed for the device, staged over gloo.

    Args:
        device: whose tensors it takes; others are refused.
        name: for `init_process_group`.
        averages: whether ReduceOp.AVG is accepted.
        not_reduced: names of the C++ scalar types that reductions refuse, such as "Double".

    Returns:
        The groups of this process by a name of their own, filled as they are made.
    """
    communicators: dict[str, Communicator] = {}

    def create(options: Any, _: Any) -> Any:
        gloo = dist.ProcessGroupGloo(
            dist.PrefixStore(f"{name}-host", options.store), options.group_rank, options.group_size, options.timeout
        )
        backend = library(device).staged_backend(name, gloo, averages, not_reduced)
        communicators[f"{name}_{len(communicators)}"] = Communicator(backend, gloo)
        return backend

    dist.Backend.register_backend(name, create, extended_api=True, devices=[device])
    return communicators


class Properties(NamedTuple):
    """What `get_device_properties` returns."""

    name: str
    total_memory: int = MEMORY_BYTES
    multi_processor_count: int = 1


def device_functions(device: Device, name: str) -> dict[str, Callable[..., Any]]:
    """The functions that all `torch.<device>` modules share, by name.

    Args:
        device: the kind of device.
        name: what the hardware calls itself.
    """
    sim = library(device)

    def index_of(which: Any = None) -> int:
        if which is None:
            return int(sim.current_device())
        if isinstance(which, int):
            return which
        found = torch.device(which).index
        return int(sim.current_device()) if found is None else found

    def memory_stats(which: Any = None) -> dict[str, int]:
        return dict(sim.memory(index_of(which)))

    return {
        **_state_functions(device, name, index_of),
        **_random_functions(sim, index_of),
        **_stream_functions(device),
        "memory_stats": memory_stats,
        "memory_allocated": lambda which=None: memory_stats(which)["allocated"],
        "max_memory_allocated": lambda which=None: memory_stats(which)["peak"],
        "memory_reserved": lambda which=None: memory_stats(which)["reserved"],
        "max_memory_reserved": lambda which=None: memory_stats(which)["peak_reserved"],
        "reset_peak_memory_stats": lambda which=None: sim.reset_peak(index_of(which)),
        "empty_cache": lambda: sim.empty_cache(index_of()),
        "mem_get_info": lambda which=None: (MEMORY_BYTES - memory_stats(which)["allocated"], MEMORY_BYTES),
    }


def _state_functions(device: Device, name: str, index_of: Callable[..., int]) -> dict[str, Callable[..., Any]]:
    sim = library(device)

    @contextlib.contextmanager
    def on(which: Any) -> Iterator[None]:
        before = sim.current_device()
        sim.set_device(index_of(which))
        try:
            yield
        finally:
            sim.set_device(before)

    return {
        "init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda function: function(),
        "device_count": sim.device_count,
        "current_device": sim.current_device,
        "set_device": lambda which: sim.set_device(index_of(which)),
        "device": on,
        "synchronize": lambda which=None: None,
        "get_device_name": lambda which=None: name,
        "get_device_properties": lambda which=None: Properties(name),
        "is_bf16_supported": lambda: True,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }


def _random_functions(sim: ModuleType, index_of: Callable[..., int]) -> dict[str, Callable[..., Any]]:
    def every(function: str, *args: Any) -> None:
        for index in range(sim.device_count()):
            getattr(sim.default_generator(index), function)(*args)

    return {
        "manual_seed": lambda seed: sim.default_generator(index_of()).manual_seed(int(seed)),
        "manual_seed_all": lambda seed: every("manual_seed", int(seed)),
        "seed": lambda: sim.default_generator(index_of()).seed(),
        "initial_seed": lambda: sim.default_generator(index_of()).initial_seed(),
        "get_rng_state": lambda which=None: sim.default_generator(index_of(which)).get_state(),
        "set_rng_state": lambda state, which=None: sim.default_generator(index_of(which)).set_state(state),
    }


def _stream_functions(device: Device) -> dict[str, Callable[..., Any]]:
    @contextlib.contextmanager
    def stream(chosen: torch.Stream | None) -> Iterator[None]:
        if chosen is None:
            yield
            return
        before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(chosen)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def default_stream(which: Any = None) -> torch.Stream:
        current = torch.accelerator.current_stream()
        return torch.Stream(stream_id=0, device_index=current.device_index, device_type=current.device_type)

    return {
        "Stream": lambda which=None, priority=0, **_: torch.Stream(which or device, priority=priority),
        "Event": lambda enable_timing=False, blocking=False, interprocess=False: torch.Event(
            device, enable_timing=enable_timing
        ),
        "stream": stream,
        "set_stream": torch.accelerator.set_stream,
        "current_stream": lambda which=None: torch.accelerator.current_stream(),
        "default_stream": default_stream,
    }
