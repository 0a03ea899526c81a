"""A rank that hangs or is stopped ends all ranks, and is named."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.training.watchdog import Beat, Watchdog, describe, limit_of, place_of
from tests.training.test_failures import run

SECONDS = 3
"""--hang-timeout of these tests; the ranks end within about twice that."""


@pytest.mark.parametrize(
    ("asked", "longest", "limit"),
    [(5.0, None, 5.0), (5.0, 100.0, 5.0), (None, None, None), (None, 1.0, 600.0), (None, 100.0, 1000.0)],
)
def test_how_long_an_iteration_may_take(asked: float | None, longest: float | None, limit: float | None) -> None:
    assert limit_of(asked, 600.0, longest) == limit


def test_ranks_at_one_place_share_a_line_and_the_guilty_come_first() -> None:
    def beat(waits: bool, place: str) -> Beat:
        return Beat(number=3, host="n1", pid=7, doing="iteration 9", place=place, waits=waits)

    beats = {
        0: beat(True, "all_reduce"),
        1: beat(False, "read"),
        2: beat(True, "all_reduce"),
        3: beat(True, "x"),
        4: None,
    }
    assert describe(beats, frozenset({3, 4})) == [
        "  rank 3: does not answer (process 7 on n1 is stopped, dead or out of reach); last seen: iteration 9, in x",
        "  rank 4: gives no sign of life",
        "  rank 1: DOES NOT WAIT FOR OTHERS: iteration 9, in read",
        "  rank 0, 2: waits for others: iteration 9, in all_reduce",
    ]


def test_where_a_thread_is() -> None:
    here, waits = place_of(sys._getframe())
    assert here.startswith("test_where_a_thread_is (")
    assert not waits
    assert place_of(None) == ("an unknown place", False)


def _work(trouble: str, asked: float | None = SECONDS, collectives: float = 600.0) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=collectives))
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    with Watchdog(rank=rank, world_size=2, asked=asked, collectives=collectives, store=store) as watchdog:
        for step in range(1_000_000):
            watchdog.begin(f"iteration {step}")
            dist.all_reduce(torch.ones(1))
            if step == 20 and rank == 1:
                _stuck() if trouble == "hangs" else os.kill(os.getpid(), signal.SIGSTOP)
            watchdog.end_of_iteration()


def _stuck() -> None:
    time.sleep(1000.0)


def _hangs() -> None:
    _work("hangs")


def _is_stopped() -> None:
    _work("is stopped")


def _gives_up() -> None:
    _work("hangs", asked=None, collectives=SECONDS)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_and_is_named(tmp_path: Path) -> None:
    codes, outputs = run(_hangs, 2, tmp_path)
    assert codes == [1, 1]
    assert "[rank 0] error: iteration" in outputs[0]
    assert f"longer than {SECONDS} s (--hang-timeout). Where the ranks are:" in outputs[0]
    guilty, waiting = outputs[0].splitlines()[-2:]
    assert guilty.startswith("  rank 1: DOES NOT WAIT FOR OTHERS: iteration 20, in _stuck (")
    assert waiting.startswith("  rank 0: waits for others: iteration 21, in _work (")
    assert "Where the ranks are" not in outputs[1]


@pytest.mark.slow
def test_without_a_limit_a_collective_that_gives_up_names_the_rank(tmp_path: Path) -> None:
    codes, outputs = run(_gives_up, 2, tmp_path)
    assert codes == [1, 1]
    # The collective and the watchdog have the same limit here, as without a flag; either speaks.
    assert f"longer than {SECONDS} s" in outputs[0]
    assert "  rank 1: DOES NOT WAIT FOR OTHERS: iteration 20, in _stuck (" in outputs[0]
    assert "  rank 0: waits for others: iteration 21, in " in outputs[0]


@pytest.mark.slow
def test_a_stopped_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    codes, outputs = run(_is_stopped, 2, tmp_path)
    assert codes == [1, -signal.SIGKILL]  # the stopped one is ended by `run`, as by a launcher
    assert "  rank 1: does not answer (process " in outputs[0]
    assert "is stopped, dead or out of reach); last seen: " in outputs[0]


def test_nothing_happens_while_iterations_end_or_nobody_watches() -> None:
    with Watchdog(rank=0, world_size=1, asked=0.5, collectives=600.0, store=None) as watchdog:
        for _ in range(4):
            watchdog.begin("short")
            time.sleep(0.2)
        with watchdog.unwatched("saving"):
            time.sleep(0.9)
