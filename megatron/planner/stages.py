"""What a pipeline schedule means for a plan: how many micro-batches a rank holds, and how long it waits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.mpu.pipeline import StageLayout
from megatron.mpu.schedule import COSTS, Kind, ScheduleName, Task, order_tasks, simulate

_ROUNDS = 4
"""Rounds of as many micro-batches as there are ranks after which nothing new happens, in all schedules but GPipe."""
_CHANGES: Mapping[Kind, tuple[int, int]] = {"F": (1, 0), "B": (-1, 0), "I": (-1, 1), "W": (0, -1)}


class AtOnce(NamedTuple):
    """Micro-batches that a stage holds: between forward and backward, and with deferred gradients of weights."""

    stage: int
    running: int
    deferred: int


Held = tuple[AtOnce, ...]
"""What a rank holds at one time, by stage."""


@functools.cache
def held_at_once(name: ScheduleName, layout: StageLayout, microbatches: int) -> tuple[tuple[Held, ...], ...]:
    """The largest sets of micro-batches that each rank holds at once, without those that are part of a larger one."""
    orders = order_tasks(name, layout, _enough(name, layout, microbatches))
    return tuple(_largest(tasks, layout.stages_of(rank)) for rank, tasks in enumerate(orders))


def _largest(tasks: Sequence[Task], stages: Sequence[int]) -> tuple[Held, ...]:
    now = {stage: AtOnce(stage, 0, 0) for stage in stages}
    seen: set[Held] = set()
    for task in tasks:
        running, deferred = _CHANGES[task.kind]
        held = now[task.stage]
        now[task.stage] = AtOnce(task.stage, held.running + running, held.deferred + deferred)
        seen.add(tuple(now.values()))
    return tuple(found for found in seen if not any(other != found and _covers(other, found) for other in seen))


def _covers(larger: Held, smaller: Held) -> bool:
    return all(a.running >= b.running and a.deferred >= b.deferred for a, b in zip(larger, smaller, strict=True))


@functools.cache
def idle_passes(name: ScheduleName, layout: StageLayout, microbatches: int) -> float:
    """How long ranks wait in a step, in passes: forward and backward of a micro-batch through a rank's stages.

    A few rounds of micro-batches show it: from then on every micro-batch adds its own time and no waiting.
    """
    if layout.ranks == 1:
        return 0.0
    count = _enough(name, layout, microbatches)
    timeline = simulate(order_tasks(name, layout, count), layout)
    one_pass = layout.chunks * (COSTS["F"] + COSTS["B"])
    return timeline.length / one_pass - count


def _enough(name: ScheduleName, layout: StageLayout, microbatches: int) -> int:
    return microbatches if name == "gpipe" else min(microbatches, _ROUNDS * layout.ranks)
