"""The device layer: `select` chooses one accelerator, once; everything above works through its interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import cast

from megatron.accelerators.base import (
    Accelerator,
    Capabilities,
    EnvVar,
    MemoryStats,
    UnavailableDeviceError,
    host_threads,
)

__all__ = [
    "DEVICES",
    "Accelerator",
    "Capabilities",
    "EnvVar",
    "MemoryStats",
    "UnavailableDeviceError",
    "deepspeed_environment",
    "host_threads",
    "load",
    "select",
]

DEVICES = ("cuda", "hpu", "npu", "neuron", "neuron_xla", "cpu")
"""Known devices in the order `select("auto")` probes them; each is a module here with a function `accelerator()`."""


def load(name: str) -> Accelerator:
    """The accelerator called `name`, whether or not this machine has it. Raises UnavailableDeviceError if unknown."""
    if name not in DEVICES:
        raise UnavailableDeviceError(f"--device {name}: unknown device. {_what_is_here()}")
    module = importlib.import_module(f"{__name__}.{name}")
    return cast(Accelerator, module.accelerator())


def select(name: str) -> Accelerator:
    """The accelerator for this run.

    Args:
        name: a name from `DEVICES`, or "auto" for the first of them that is available.

    Raises:
        UnavailableDeviceError: the device is unknown or cannot be used here; the message lists all with reasons.
    """
    if name == "auto":
        return next(device for device in map(load, DEVICES) if device.is_available())
    chosen = load(name)
    if not chosen.is_available():
        raise UnavailableDeviceError(f"--device {name}: {chosen.unavailable_reason()}. {_what_is_here()}")
    return chosen


def deepspeed_environment(accelerator: Accelerator, env: Mapping[str, str]) -> dict[str, str]:
    """Variables DeepSpeed must find before its first import, so that it uses the device chosen here.

    `LOCAL_SIZE` is set by DeepSpeed's own launcher only; without it, its shared-memory collectives crash under
    torchrun. `LOCAL_RANK` is set by launchers only; a process on its own is the first of its node.

    Args:
        accelerator: the device of this run.
        env: the environment of this process.

    Raises:
        UnavailableDeviceError: DeepSpeed has no such device, or `DS_ACCELERATOR` already names another one.
    """
    wanted = accelerator.deepspeed_name
    if wanted is None:
        raise UnavailableDeviceError(f"DeepSpeed has no accelerator for {accelerator.name}: run without --deepspeed")
    given = env.get("DS_ACCELERATOR", wanted)
    if given != wanted:
        raise UnavailableDeviceError(
            f"DS_ACCELERATOR={given} contradicts the device {accelerator.name}, which DeepSpeed calls {wanted}: "
            f"unset DS_ACCELERATOR or pass the matching --device"
        )
    local_size = env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE", "1")
    return {"DS_ACCELERATOR": wanted, "LOCAL_SIZE": local_size, "LOCAL_RANK": env.get("LOCAL_RANK", "0")}


def _what_is_here() -> str:
    """One sentence per known device: there, or why not."""
    states = []
    for device in map(load, DEVICES):
        reason = device.unavailable_reason()
        states.append(f"{device.name}: {'not available, ' + reason if reason else 'available'}")
    return f"Known devices: {'; '.join(states)}. --device auto takes the first that is available."
