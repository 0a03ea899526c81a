from __future__ import annotations

from itertools import combinations

import pytest

from megatron.mpu.pipeline import StageLayout
from megatron.mpu.schedule import (
    DeadlockError,
    Receive,
    ScheduleName,
    Task,
    describe,
    needs,
    order_tasks,
    simulate,
    with_receives,
)

SCHEDULES: tuple[tuple[ScheduleName, int], ...] = (
    ("gpipe", 1),
    ("1f1b", 1),
    *(("interleaved", chunks) for chunks in (2, 3, 4)),
    *(("zero-bubble", chunks) for chunks in (1, 2, 3)),
    ("zbv", 2),
)
CASES = [(name, chunks, ranks) for name, chunks in SCHEDULES for ranks in (1, 2, 3, 4, 6, 8)]
UNIT = {"F": 1.0, "B": 1.0, "I": 1.0, "W": 1.0}
LOPSIDED = {"F": 1.0, "B": 5.0, "I": 0.3, "W": 4.0}


def _layout(name: ScheduleName, chunks: int, ranks: int) -> StageLayout:
    return StageLayout(ranks, (1,) * (chunks * ranks), "vee" if name == "zbv" else "loop")


@pytest.mark.parametrize(("name", "chunks", "ranks"), CASES)
def test_every_task_is_done_once_and_never_waits_for_ever(name: ScheduleName, chunks: int, ranks: int) -> None:
    layout = _layout(name, chunks, ranks)
    kinds = "FIW" if name in ("zero-bubble", "zbv") else "FB"
    for microbatches in range(1, 3 * ranks + 2):
        orders = order_tasks(name, layout, microbatches)
        for rank, tasks in enumerate(orders):
            stages = layout.stages_of(rank)
            expected = [Task(k, s, m) for k in kinds for s in stages for m in range(microbatches)]
            assert sorted(tasks) == sorted(expected)
        timeline = simulate(orders, layout)
        assert len(timeline.ends) == len(kinds) * layout.stages * microbatches
        # Whoever evaluates runs the forward tasks alone.
        simulate([[task for task in tasks if task.kind == "F"] for tasks in orders], layout)


def _most_in_flight(tasks: list[Task]) -> int:
    """Forward tasks whose activations are still needed, at most."""
    most = now = 0
    for task in tasks:
        now += {"F": 1, "I": 0, "B": -1, "W": -1}[task.kind]
        most = max(most, now)
    return most


@pytest.mark.parametrize(("name", "chunks", "ranks"), CASES)
def test_activations_in_flight_are_bounded(name: ScheduleName, chunks: int, ranks: int) -> None:
    layout = _layout(name, chunks, ranks)
    for microbatches in (1, ranks, 2 * ranks, 5 * ranks):
        for rank, tasks in enumerate(order_tasks(name, layout, microbatches)):
            bound = {
                "gpipe": microbatches,
                "1f1b": ranks - rank,
                "interleaved": 2 * (ranks - rank) - 1 + (chunks - 1) * ranks,
                "zero-bubble": chunks * ranks,
                "zbv": 2 * ranks,
            }[name]
            assert _most_in_flight(tasks) <= bound


@pytest.mark.parametrize(("name", "chunks", "ranks"), CASES)
def test_all_ranks_agree_on_the_order_of_transfers(name: ScheduleName, chunks: int, ranks: int) -> None:
    layout = _layout(name, chunks, ranks)
    for microbatches in (1, ranks, 2 * ranks + 1):
        orders = order_tasks(name, layout, microbatches)
        steps = [with_receives(orders, layout, rank) for rank in range(ranks)]
        for rank, tasks in enumerate(orders):
            assert [step for step in steps[rank] if isinstance(step, Task)] == tasks
        seen = [_transfers(steps[rank], layout, rank) for rank in range(ranks)]
        for one, other in combinations(range(ranks), 2):
            assert [item for item, peer in seen[one] if peer == other] == [
                item for item, peer in seen[other] if peer == one
            ]


def _transfers(steps: list[Task | Receive], layout: StageLayout, rank: int) -> list[tuple[Task, int]]:
    """(the task that a transfer is for, the other rank), in the order of this rank."""
    found: list[tuple[Task, int]] = []
    ready: set[Task] = set()
    for step in steps:
        if isinstance(step, Receive):
            (source,) = {layout.rank_of(n.stage) for n in needs(step.task, layout)} - {rank}
            found.append((_plain(step.task), source))
            ready.add(step.task)
            continue
        elsewhere = [n for n in needs(step, layout) if layout.rank_of(n.stage) != rank]
        assert not elsewhere or step in ready, "a task runs before what it needs can arrive"
        stage = step.stage + {"F": 1, "B": -1, "I": -1, "W": 0}[step.kind]
        if stage != step.stage and 0 <= stage <= layout.last and layout.rank_of(stage) != rank:
            found.append((_plain(step._replace(stage=stage)), layout.rank_of(stage)))
    return found


def _plain(task: Task) -> Task:
    return task._replace(kind="F" if task.kind == "F" else "B")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_idle_time_is_what_the_papers_say(ranks: int) -> None:
    def idle(name: ScheduleName, chunks: int, costs: dict[str, float]) -> float:
        layout = _layout(name, chunks, ranks)
        return simulate(order_tasks(name, layout, m), layout, costs).idle  # type: ignore[arg-type]

    m, costs = 4 * ranks, {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    for name in ("gpipe", "1f1b"):
        assert idle(name, 1, costs) == pytest.approx((ranks - 1) / (m + ranks - 1))
    for chunks in (2, 3):
        assert idle("interleaved", chunks, costs) == pytest.approx((ranks - 1) / (chunks * m + ranks - 1))
    # ZB-H1 leaves a third of the bubble; ZB-V only that ranks begin and end one after the other.
    for chunks in (1, 2, 3):
        assert idle("zero-bubble", chunks, costs) == pytest.approx((ranks - 1) / (3 * chunks * m + ranks - 1))
    assert idle("zbv", 2, costs) == pytest.approx((ranks - 1) / (6 * m + ranks - 1))


@pytest.mark.parametrize("costs", [UNIT, LOPSIDED], ids=["unit", "lopsided"])
def test_a_timeline_respects_what_tasks_need(costs: dict[str, float]) -> None:
    layout = _layout("zbv", 2, 4)
    orders = order_tasks("zbv", layout, 9)
    timeline = simulate(orders, layout, costs)  # type: ignore[arg-type]
    ends = dict(timeline.ends)
    for task, end in timeline.ends:
        for needed in needs(task, layout):
            assert ends[needed] <= end - costs[task.kind] + 1e-9
    assert timeline.length == max(ends.values())
    assert timeline.busy == tuple(sum(costs[task.kind] for task in tasks) for tasks in orders)


def test_a_deadlock_is_found() -> None:
    layout = StageLayout(2, (1, 1))
    first, second = order_tasks("1f1b", layout, 2)
    with pytest.raises(DeadlockError, match="6 tasks are never done"):
        simulate([[Task("B", 0, 0), *first], second[:1]], layout)


def test_four_stages_and_six_batches_as_in_the_papers_figure() -> None:
    layout = StageLayout(4, (1,) * 4)
    orders = order_tasks("1f1b", layout, 6)
    text = [" ".join(f"{task.kind}{task.microbatch}" for task in tasks) for tasks in orders]
    assert text[0] == "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5"
    assert text[3] == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5"


def test_a_zero_bubble_schedule_delays_weight_gradients() -> None:
    tasks = order_tasks("zero-bubble", StageLayout(4, (1,) * 4), 6)[2]
    text = " ".join(f"{task.kind}{task.microbatch}" for task in tasks)
    assert text == "F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5"


def test_a_line_says_what_the_pipeline_is() -> None:
    assert describe("interleaved", StageLayout(2, (1, 2, 2, 1)), 4) == (
        "pipeline: interleaved, 2 ranks of 2 stages, layers of the stages: 1 2 2 1; "
        "with 4 micro-batches ranks are idle for 11.1% of the time"
    )


@pytest.mark.parametrize(
    ("name", "chunks", "microbatches"), [("1f1b", 2, 4), ("interleaved", 1, 4), ("zbv", 3, 4), ("gpipe", 1, 0)]
)
def test_schedules_need_their_stages(name: ScheduleName, chunks: int, microbatches: int) -> None:
    with pytest.raises(ValueError, match=f"the pipeline schedule {name} cannot be had with {chunks} stages per rank"):
        order_tasks(name, StageLayout(2, (1,) * (2 * chunks)), microbatches)
