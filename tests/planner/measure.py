"""What memory torch really hands out: every allocation on the CPU, from torch's profiler."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

_MARK = "memory mark: "


@dataclass
class Memory:
    """Bytes above those at the start of the measurement, by section: held at its start, and at most during it."""

    held: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)


def mark(section: str) -> None:
    """Start a section of the measurement."""
    with record_function(_MARK + section):
        pass


@contextlib.contextmanager
def measured() -> Iterator[Memory]:
    """Measure what happens inside; the result is filled in at the end. Sections are started by `mark`."""
    memory = Memory()
    gc.collect()  # what an earlier test left must not be freed within the measurement
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield memory
        mark("end")
    events: list[tuple[int, Any]] = []
    _collect(profiler.profiler.kineto_results.experimental_event_tree(), events)
    events.sort(key=lambda event: event[0])
    now, section = 0, "start"
    memory.held[section] = memory.peak[section] = 0
    for _, what in events:
        if isinstance(what, str):
            section = what
            memory.held[section] = memory.peak[section] = now
        else:
            now += what
            memory.peak[section] = max(memory.peak[section], now)


def _collect(tree: Any, events: list[tuple[int, Any]]) -> None:
    for event in tree:
        if event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
        elif event.name.startswith(_MARK):
            events.append((event.start_time_ns, event.name.removeprefix(_MARK)))
        _collect(event.children, events)


@contextlib.contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """torch.distributed as one rank of many sees it; its collectives return at once, with meaningless numbers."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
