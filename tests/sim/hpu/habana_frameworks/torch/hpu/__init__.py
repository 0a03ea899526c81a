"""SIMULATION of habana_frameworks.torch.hpu, which torch knows as `torch.hpu`.

A Gaudi process opens one card, the one of its module id, and calls it index 0 whatever the id.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from habana_frameworks.torch.hpu import random
from tests.sim import runtime

_NAME = "GAUDI2 (simulated)"
_NODE_CARDS = 8
_RANDOM = ("get_rng_state", "initial_seed", "manual_seed", "manual_seed_all", "set_rng_state")
globals().update(runtime.device_functions("hpu", _NAME))
globals().update({name: getattr(random, name) for name in _RANDOM})


def device_count() -> int:
    """Cards of the node, of which this process opens one."""
    return _NODE_CARDS


def set_device(device: Any) -> None:
    """Choose the card by its module id; once chosen, another one cannot be had."""
    index = device if isinstance(device, int) else torch.device(device).index or 0
    if not 0 <= index < _NODE_CARDS:
        raise AssertionError(f"Trying to open device with idx={index} when only {_NODE_CARDS} are available")
    os.environ.setdefault("HLS_MODULE_ID", str(index))


def current_device() -> int:
    """Always 0."""
    return 0


def memory_stats(device: Any = None) -> dict[str, int]:
    """The real package's keys; of the counts only those of bytes are kept."""
    stats = runtime.library("hpu").memory(0)
    return {
        "Limit": runtime.MEMORY_BYTES,
        "InUse": stats["allocated"],
        "MaxInUse": stats["peak"],
        **dict.fromkeys(("NumAllocs", "NumFrees", "ActiveAllocs", "MaxAllocSize"), 0),
        **dict.fromkeys(("TotalSystemAllocs", "TotalSystemFrees", "TotalActiveAllocs"), 0),
    }


def memory_reserved(device: Any = None) -> int:
    """The whole card: the real allocator reserves it at the start."""
    return memory_stats()["Limit"]


def max_memory_reserved(device: Any = None) -> int:
    """See `memory_reserved`."""
    return memory_stats()["Limit"]


def setDeterministic(value: bool) -> None:
    """Deprecated in the real package, too."""
    warnings.warn("torch.hpu.setDeterministic is deprecated", stacklevel=2)


class _Recompute:
    enabled = False


def recompute_sdp_enabled() -> bool:
    """Whether FusedSDPA recomputes in backward where its argument does not say."""
    return _Recompute.enabled


@contextlib.contextmanager
def sdp_kernel(enable_recompute: bool = False) -> Iterator[None]:
    """Sets what `recompute_sdp_enabled` says."""
    before, _Recompute.enabled = _Recompute.enabled, enable_recompute
    try:
        yield
    finally:
        _Recompute.enabled = before


runtime.register("hpu", sys.modules[__name__])
