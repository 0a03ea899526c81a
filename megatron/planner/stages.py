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


class Holding(NamedTuple):
    """The largest sets of micro-batches that a rank holds, without those that are part of a larger one.

    Attributes:
        ever: at any time of a step.
        reducing: while the last micro-batch gives a stage its gradients, which are then reduced.
    """

    ever: tuple[Held, ...]
    reducing: tuple[Held, ...]


@functools.cache
def held_at_once(name: ScheduleName, layout: StageLayout, microbatches: int) -> tuple[Holding, ...]:
    """What each rank holds."""
    count = _enough(name, layout, microbatches)
    orders = order_tasks(name, layout, count)
    return tuple(_holding(tasks, layout.stages_of(rank), count - 1) for rank, tasks in enumerate(orders))


def _holding(tasks: Sequence[Task], stages: Sequence[int], last: int) -> Holding:
    now = {stage: AtOnce(stage, 0, 0) for stage in stages}
    ever: set[Held] = set()
    reducing: set[Held] = set()
    for task in tasks:
        if task.kind in ("B", "W") and task.microbatch == last:
            reducing.add(tuple(now.values()))
        running, deferred = _CHANGES[task.kind]
        held = now[task.stage]
        now[task.stage] = AtOnce(task.stage, held.running + running, held.deferred + deferred)
        ever.add(tuple(now.values()))
    return Holding(_largest(ever), _largest(reducing))


def _largest(seen: set[Held]) -> tuple[Held, ...]:
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
