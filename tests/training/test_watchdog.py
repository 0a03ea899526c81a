"""A rank that hangs or is stopped ends all ranks, and is named."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem

from megatron.checkpoint import WRITER, Saver, SaveSettings, TrainingState
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
    assert limit_of(asked, 600.0, longest, computes=False) == (limit or 600.0)  # a file needs no compiler


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


def _watchdog(asked: float | None = SECONDS, collectives: float = 600.0) -> Watchdog:
    dist.init_process_group("gloo", timeout=timedelta(seconds=collectives))
    store = dist.distributed_c10d._get_default_store()
    return Watchdog(rank=dist.get_rank(), world_size=2, asked=asked, collectives=collectives, store=store)


def _work(trouble: str, asked: float | None = SECONDS, collectives: float = 600.0, guilty: int = 1) -> None:
    with _watchdog(asked, collectives) as watchdog, watchdog.watched("training"):
        rank = dist.get_rank()
        for step in range(1_000_000):
            watchdog.begin(f"iteration {step}")
            dist.all_reduce(torch.ones(1))
            if step == 20 and rank == guilty:
                _stuck() if trouble == "hangs" else os.kill(os.getpid(), signal.SIGSTOP)
            watchdog.end_of_iteration()


def _stuck() -> None:
    time.sleep(1000.0)


def _hangs() -> None:
    _work("hangs")


def _is_stopped() -> None:
    _work("is stopped")


def _first_is_stopped() -> None:
    _work("is stopped", guilty=0)


def _gives_up() -> None:
    _work("hangs", asked=None, collectives=SECONDS)


class _Stuck(LocalFileSystem):
    """A file system that hangs where the second rank writes its tensors."""

    protocol = "stuck"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("stuck://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode and Path(path).name == "__1_0.distcp":
            _stuck()
        return super()._open(path, mode, **options)


def _saves(folder: str) -> None:
    """The second rank reads slowly, but gets on, for longer than the limit; then its thread hangs in a save."""
    fsspec.register_implementation("stuck", _Stuck)
    with _watchdog() as watchdog:
        with watchdog.watched("loading", computes=False):
            for _ in range(5 * SECONDS * dist.get_rank()):
                time.sleep(0.4)
                watchdog.progress()
            dist.barrier()
        print("loaded", flush=True)
        settings, group = SaveSettings(background=True), dist.new_group(backend="gloo")
        saver = Saver(f"stuck://{folder}", settings, group=group, progress=watchdog.progress)
        saver.save(1, TrainingState(tensors={f"model.{i}": torch.ones(9) for i in range(9)}, progress={}, run={}))
        with watchdog.watched("saving", computes=False, helper=WRITER):
            saver.finish()


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
def test_a_rank_that_hangs_in_a_save_is_named_and_a_slow_one_is_let_be(tmp_path: Path) -> None:
    codes, outputs = run(functools.partial(_saves, str(tmp_path)), 2, tmp_path)
    assert codes == [1, 1]
    assert "loaded" in outputs[0]
    assert "[rank 0] error: saving has got no further for " in outputs[0]
    guilty, waiting = outputs[0].splitlines()[-2:]
    assert guilty.startswith("  rank 1: DOES NOT WAIT FOR OTHERS: saving, in _stuck (")
    assert waiting.startswith("  rank 0: waits for others: saving, in write_tensors (")


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


@pytest.mark.slow
def test_a_stopped_rank_that_keeps_the_store_ends_the_others(tmp_path: Path) -> None:
    codes, outputs = run(_first_is_stopped, 2, tmp_path)
    assert codes == [-signal.SIGKILL, 1]
    assert "(torchrun, else rank 0) is gone or stopped. This one is in _work (" in outputs[1]


def test_nothing_happens_while_iterations_end_or_nobody_watches() -> None:
    with Watchdog(rank=0, world_size=1, asked=0.5, collectives=600.0, store=None) as watchdog:
        with watchdog.watched("training"):
            for _ in watchdog.each(range(4), "evaluation"):
                time.sleep(0.2)
            with watchdog.watched("saving", computes=False):
                for _ in range(3):
                    time.sleep(0.2)
                    watchdog.progress()
        time.sleep(0.9)
