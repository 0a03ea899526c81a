"""Timers: what they cost, what they measure and how they are printed."""

from __future__ import annotations

import time

import pytest

from megatron.training.timers import TIMER_LEVELS, Timers, running_timers, timers_report


def test_above_the_level_nothing_is_called() -> None:
    calls: list[str] = []
    timers = Timers(0, synchronize=lambda: calls.append("sync"), barrier=lambda: calls.append("barrier"))
    assert timers("forward-compute") is timers("optimizer")
    with timers("forward-compute"), timers("optimizer"):
        pass
    assert calls == []
    assert timers.take(["forward-compute"]) == [0.0]


def test_level_one_meets_the_other_ranks_and_level_zero_and_two_do_not() -> None:
    calls: list[str] = []
    timers = Timers(2, synchronize=lambda: calls.append("sync"), barrier=lambda: calls.append("barrier"))
    with timers("forward-compute"), timers("eval-time"):
        pass
    assert calls == ["sync"] * 4
    calls.clear()
    with timers("optimizer"):
        pass
    assert calls == ["barrier", "sync"] * 2


def test_sums_until_taken() -> None:
    timers = Timers(1, synchronize=lambda: None)
    for _ in range(2):
        with timers("optimizer"):
            time.sleep(0.01)
    first, other = timers.take(["optimizer", "grads-all-reduce"])
    assert first >= 0.02 and other == 0.0
    assert timers.take(["optimizer"]) == [0.0]


def test_a_running_timer_can_be_read() -> None:
    timers = Timers(0, synchronize=lambda: None)
    with timers("interval-time"):
        time.sleep(0.01)
        assert timers.take(["interval-time"])[0] >= 0.01
        assert timers.take(["interval-time"])[0] < 0.01


def test_a_failure_inside_does_not_wait_for_the_device() -> None:
    calls: list[str] = []
    timers = Timers(0, synchronize=lambda: calls.append("sync"))
    with pytest.raises(ZeroDivisionError), timers("eval-time"):
        _ = 1 / 0
    assert calls == ["sync"]
    with timers("eval-time"):  # and the timer can be used again
        pass


def test_refusals() -> None:
    timers = Timers(1, synchronize=lambda: None)
    with pytest.raises(KeyError, match="no-such-timer"):
        timers("no-such-timer")
    with pytest.raises(ValueError, match="--timing-log-level is 3"):
        Timers(3, synchronize=lambda: None)
    with timers("optimizer"), pytest.raises(RuntimeError, match="already runs"), timers("optimizer"):
        pass


def test_names_per_level() -> None:
    assert running_timers(2) == list(TIMER_LEVELS)
    assert "eval-time" in running_timers(0) and "optimizer" not in running_timers(0)
    assert "optimizer" in running_timers(1) and "backward-compute" not in running_timers(1)


NAMES = ["forward-backward", "optimizer", "eval-time"]
SECONDS = [[4.68759, 0.0, 0.0], [4.72548, 0.25, 0.0]]


def test_report_minmax_is_megatrons() -> None:
    assert timers_report(NAMES, SECONDS) == (
        "(min, max) time across ranks (ms):\n"
        "    forward-backward ...............................: (4687.59, 4725.48)\n"
        "    optimizer ......................................: (250.00, 250.00)"
    )


def test_report_max_and_all_and_per_step() -> None:
    assert timers_report(NAMES, SECONDS, "max", steps=10) == (
        "max time across ranks (ms):\n"
        "    forward-backward ...............................: 472.55\n"
        "    optimizer ......................................: 25.00"
    )
    assert timers_report(NAMES, SECONDS, "all") == (
        "times across ranks (ms):\n"
        "  forward-backward:\n     rank  0: 4687.59\n     rank  1: 4725.48\n"
        "  optimizer:\n     rank  1: 250.00"
    )
    assert timers_report(NAMES, [[0.0] * 3]) is None
