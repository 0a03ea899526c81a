"""The order in which pipeline ranks do their work: pure functions from sizes to lists of tasks.

A task is the forward ("F") or backward ("B") computation of one micro-batch in one stage. Zero-bubble schedules cut the
backward in two: "I" computes the gradient of the stage's input, for which the stage before waits, "W" the gradients of
the weights, for which nobody does. p = ranks, v = stages per rank, m = micro-batches, r = a rank.

| schedule    | stages per rank | source                       | micro-batches in flight on rank r, at most |
|-------------|-----------------|------------------------------|--------------------------------------------|
| gpipe       | 1               | arXiv:1811.06965             | m                                          |
| 1f1b        | 1               | arXiv:2006.09503             | p - r                                      |
| interleaved | 2 or more       | arXiv:2104.04473             | 2 (p - r) - 1 + (v - 1) p, of a v-th each  |
| zero-bubble | 1 or more       | arXiv:2401.10241 (ZB-H1)     | p + (v - 1) p, of a v-th each              |
| zbv         | 2               | arXiv:2401.10241 section 6   | 2 p, of half the layers each               |

Any number of micro-batches will do: an interleaved schedule takes them in rounds of about p.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron.mpu.pipeline import StageLayout

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"]
Kind = Literal["F", "B", "I", "W"]
COSTS: Mapping[Kind, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""Time of each kind for a matrix product: two of them in backward."""


class Task(NamedTuple):
    """One piece of work of a rank."""

    kind: Kind
    stage: int
    microbatch: int


class Receive(NamedTuple):
    """A rank gets ready to receive what `task` needs from another rank: hidden states or their gradient."""

    task: Task


class DeadlockError(ValueError):
    """The tasks of different ranks wait for each other."""


def splits_backward(name: ScheduleName) -> bool:
    """Whether a schedule has tasks "I" and "W" instead of "B"."""
    return name in ("zero-bubble", "zbv")


def order_tasks(name: ScheduleName, layout: StageLayout, microbatches: int) -> list[list[Task]]:
    """The tasks of every rank, in the order in which it does them.

    Raises:
        ValueError: the schedule needs another number of stages per rank, or there are no micro-batches.
    """
    p, v = layout.ranks, layout.chunks
    fits = {"gpipe": v == 1, "1f1b": v == 1, "interleaved": v > 1, "zero-bubble": True, "zbv": v == 2}[name]
    if not fits or microbatches < 1:
        raise ValueError(f"the pipeline schedule {name} cannot be had with {v} stages per rank, {microbatches} batches")
    if name == "zbv":
        return [_vee(rank, layout, microbatches) for rank in range(p)]
    if name in ("gpipe", "1f1b"):
        ahead = [microbatches if name == "gpipe" else p - 1 - rank for rank in range(p)]
        return [_alternate(rank, layout, microbatches, ahead[rank]) for rank in range(p)]
    if name == "zero-bubble":
        size = _rounds(microbatches, p)[0]
        return [_split(rank, layout, microbatches, (v - 1) * size + p - 1 - rank) for rank in range(p)]
    size = _rounds(microbatches, p)[0]
    return [_alternate(rank, layout, microbatches, (v - 1) * size + 2 * (p - 1 - rank)) for rank in range(p)]


def _rounds(microbatches: int, ranks: int) -> list[int]:
    """Micro-batches cut into rounds of about as many as there are ranks, the longer ones first."""
    count = max(1, microbatches // ranks)
    size, longer = divmod(microbatches, count)
    return [size + 1] * longer + [size] * (count - longer)


def _forwards(rank: int, layout: StageLayout, microbatches: int) -> list[tuple[int, int]]:
    """(stage, micro-batch) of a rank's forward tasks: round by round, in each one stage after the other."""
    found: list[tuple[int, int]] = []
    start = 0
    for size in _rounds(microbatches, layout.ranks):
        for stage in layout.stages_of(rank):
            found += [(stage, microbatch) for microbatch in range(start, start + size)]
        start += size
    return found


def _backwards(rank: int, layout: StageLayout, microbatches: int) -> list[tuple[int, int]]:
    """The same for backward tasks, which begin with the last stage."""
    mirrored = dict(zip(layout.stages_of(rank), reversed(layout.stages_of(rank)), strict=True))
    return [(mirrored[stage], microbatch) for stage, microbatch in _forwards(rank, layout, microbatches)]


def _alternate(rank: int, layout: StageLayout, microbatches: int, ahead: int) -> list[Task]:
    """`ahead` forward tasks, then one forward and one backward in turns, then the backward tasks that are left."""
    forwards = [Task("F", *at) for at in _forwards(rank, layout, microbatches)]
    backwards = [Task("B", *at) for at in _backwards(rank, layout, microbatches)]
    tasks = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        tasks += [forward, backward]
    return tasks + backwards[len(forwards[ahead:]) :]


def _split(rank: int, layout: StageLayout, microbatches: int, ahead: int) -> list[Task]:
    """Like `_alternate` with the backward cut in two: from the r-th backward on, each is followed by one "W"."""
    tasks: list[Task] = []
    waiting: list[Task] = []
    seen = 0
    for task in _alternate(rank, layout, microbatches, ahead):
        if task.kind == "F":
            tasks.append(task)
            continue
        tasks.append(task._replace(kind="I"))
        waiting.append(task._replace(kind="W"))
        seen += 1
        if seen > rank:
            tasks.append(waiting.pop(0))
    return tasks + waiting


def _vee(rank: int, layout: StageLayout, microbatches: int) -> list[Task]:
    """The pattern of ZB-V, which repeats for ever from 2 p - 1 micro-batches on; of fewer, it is the beginning."""
    down, up = layout.stages_of(rank)
    after, count = layout.ranks - rank, max(microbatches, 2 * layout.ranks - 1)
    pattern: list[tuple[Kind, int]] = [("F", down)] * (2 * after - 1)
    pattern += [("F", up), ("F", down)] * rank
    pattern += [("F", up), ("I", up), ("W", up)] * after
    done = 2 * after - 1 + rank  # forward tasks of the stage on the way down
    both: list[tuple[Kind, int]] = [("I", down), ("W", down), ("F", up), ("I", up), ("W", up)]
    pattern += [("F", down), *both] * (count - done)
    pattern += both * (done - rank - after)
    pattern += [("I", down), ("I", up)] * rank
    pattern += [("I", down), ("W", down)] * after
    pattern += [("W", up)] * rank
    pattern += [("W", down)] * rank
    numbers: dict[tuple[Kind, int], int] = {}
    tasks: list[Task] = []
    for kind, stage in pattern:
        number = numbers.get((kind, stage), 0)
        numbers[kind, stage] = number + 1
        tasks.append(Task(kind, stage, number))
    return [task for task in tasks if task.microbatch < microbatches]


def needs(task: Task, layout: StageLayout) -> Iterator[Task]:
    """The tasks that must be done before this one; a backward is named "I", whether it is cut in two or not."""
    if task.kind == "F":
        if task.stage > 0:
            yield Task("F", task.stage - 1, task.microbatch)
    elif task.kind == "W":
        yield task._replace(kind="I")
    else:
        yield task._replace(kind="F")
        if task.stage < layout.last:
            yield Task("I", task.stage + 1, task.microbatch)


@dataclass(frozen=True)
class Timeline:
    """When every task of a step runs, if transfers take no time.

    Attributes:
        ends: (task, end) in the order in which tasks end.
        length: end of the last task, in the unit of the costs.
        busy: time that each rank computes.
    """

    ends: tuple[tuple[Task, float], ...]
    length: float
    busy: tuple[float, ...]

    @property
    def idle(self) -> float:
        """The part of all ranks' time that is spent waiting (the bubble), from 0 to 1."""
        return 1.0 - sum(self.busy) / (self.length * len(self.busy))


def simulate(orders: Sequence[Sequence[Task]], layout: StageLayout, costs: Mapping[Kind, float] = COSTS) -> Timeline:
    """Run the tasks of all ranks, each rank in its order, each task as early as possible.

    Args:
        orders: of every rank, see `order_tasks`.
        layout: where the stages are.
        costs: time that a task of each kind takes.

    Raises:
        DeadlockError: if tasks wait for each other.
    """
    ends: dict[Task, float] = {}
    clocks, at = [0.0] * len(orders), [0] * len(orders)
    unfinished = sum(len(tasks) for tasks in orders)
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        while at[rank] < len(orders[rank]):
            task = orders[rank][at[rank]]
            before = [ends.get(needed) for needed in needs(task, layout)]
            if None in before:
                break
            clocks[rank] = max([clocks[rank], *(end for end in before if end is not None)]) + costs[task.kind]
            ends[_named(task)] = clocks[rank]
            at[rank] += 1
            unfinished -= 1
            ready += {layout.rank_of(stage) for stage in (task.stage - 1, task.stage + 1) if 0 <= stage <= layout.last}
    if unfinished:
        stuck = [tasks[done] for tasks, done in zip(orders, at, strict=True) if done < len(tasks)]
        raise DeadlockError(f"{unfinished} tasks are never done; the ranks stop at {stuck}")
    kinds = {_named(task): task for tasks in orders for task in tasks}
    done = tuple(sorted(((kinds[task], end) for task, end in ends.items()), key=lambda item: item[1]))
    busy = tuple(sum(costs[task.kind] for task in tasks) for tasks in orders)
    return Timeline(done, max(clocks), busy)


def _named(task: Task) -> Task:
    return task._replace(kind="I") if task.kind == "B" else task


def describe(name: ScheduleName, layout: StageLayout, microbatches: int) -> str:
    """A pipeline in a line for the log."""
    idle = simulate(order_tasks(name, layout, microbatches), layout).idle
    layers = " ".join(str(count) for count in layout.layers)
    return (
        f"pipeline: {name}, {layout.ranks} ranks of {layout.chunks} stages, layers of the stages: {layers}; "
        f"with {microbatches} micro-batches ranks are idle for {idle:.1%} of the time"
    )


def with_receives(orders: Sequence[Sequence[Task]], layout: StageLayout, rank: int) -> list[Task | Receive]:
    """The tasks of one rank and, between them, when it gets ready to receive what it needs from other ranks.

    A rank is ready as soon as the sender has something, which is found by simulation. All ranks then agree on the order
    of all transfers, so they never wait for each other, even if a link carries one transfer after the other.
    """
    sender_ends = simulate(orders, layout)
    places = {_named(task): number for number, (task, _) in enumerate(sender_ends.ends)}
    arrivals: list[tuple[int, Receive]] = []
    for task in orders[rank]:
        for needed in needs(task, layout):
            if layout.rank_of(needed.stage) != rank:
                arrivals.append((places[needed], Receive(task)))
    arrivals.sort(key=lambda item: item[0], reverse=True)
    steps: list[Task | Receive] = []
    for task in orders[rank]:
        while arrivals and arrivals[-1][0] < places[_named(task)]:
            steps.append(arrivals.pop()[1])
        steps.append(task)
    return steps
