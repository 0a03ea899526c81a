"""Leaving early: each cause, and that all ranks decide alike."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.training.signals import Cause, Exit, ExitRules, SignalError, SignalFlag, decide_exit, parse_signal
from tests.support import run_ranks


def decide(rules: ExitRules, reduce: Callable[[int], int] = lambda value: value, **facts: Any) -> Exit | None:
    return decide_exit(
        rules, **{"rank": 0, "iteration": 5, "minutes": 1.0, "received": False, "all_reduce_max": reduce, **facts}
    )


def test_the_signal_is_remembered_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with SignalFlag(signal.SIGUSR1) as flag:
        assert not flag.received
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.received
    assert signal.getsignal(signal.SIGUSR1) is before


def test_without_a_signal_handlers_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with SignalFlag(None) as flag:
        assert signal.getsignal(signal.SIGTERM) is before
    assert not flag.received


def test_causes_and_messages(tmp_path: Path) -> None:
    on_signal = ExitRules(on_signal=signal.SIGTERM)
    assert decide(on_signal) is None
    assert decide(on_signal, received=True) == Exit(Cause.SIGNAL, "exiting program after receiving SIGTERM.")
    duration = ExitRules(after_minutes=2)
    assert decide(duration, minutes=2.0) is None
    assert decide(duration, minutes=2.04) == Exit(Cause.DURATION, "exiting program after 2.0 minutes")
    switch = ExitRules(kill_switch=tmp_path / "stop")
    assert decide(switch) is None
    (tmp_path / "stop").touch()
    assert decide(switch) == Exit(Cause.KILL_SWITCH, f"Detected kill switch at {tmp_path / 'stop'}. Exiting")
    assert decide(switch, rank=1) is None  # only rank 0 looks
    assert (tmp_path / "stop").exists()


def test_the_interval_needs_no_communication() -> None:
    def forbidden(value: int) -> int:
        raise AssertionError("communicated")

    rules = ExitRules(every=5)
    assert decide(rules, forbidden) == Exit(Cause.INTERVAL, "exiting program at iteration 5")
    assert decide(rules, forbidden, iteration=6) is None
    assert decide(rules, forbidden, iteration=0) is None
    assert decide(ExitRules(), forbidden) is None


def test_what_another_rank_knows_wins() -> None:
    rules = ExitRules(on_signal=signal.SIGINT, every=5)
    assert decide(rules, lambda _: int(Cause.SIGNAL)) == Exit(Cause.SIGNAL, "exiting program after receiving SIGINT.")


@pytest.mark.parametrize("name", ["SIGUSR1", "usr1", str(int(signal.SIGUSR1))])
def test_parse_signal(name: str) -> None:
    assert parse_signal(name) is signal.SIGUSR1


@pytest.mark.parametrize(
    ("name", "message"), [("SIGNONE", "allowed: SIG"), ("999", "allowed"), ("KILL", "cannot catch")]
)
def test_parse_signal_refuses(name: str, message: str) -> None:
    with pytest.raises(SignalError, match=message):
        parse_signal(name)


def _rank(kill_switch: str) -> list[str | None]:
    """Rank 1 gets a signal in iteration 2, rank 0 sees the kill switch in iteration 3."""
    rank = dist.get_rank()

    def all_reduce_max(value: int) -> int:
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    rules = ExitRules(on_signal=signal.SIGUSR1, kill_switch=Path(kill_switch))
    answers = []
    for iteration in (1, 2, 3):
        with SignalFlag(rules.on_signal) as flag:
            if rank == 1 and iteration == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            if rank == 0 and iteration == 3:
                Path(kill_switch).touch()
            decision = decide_exit(
                rules,
                rank=rank,
                iteration=iteration,
                minutes=0.0,
                received=flag.received,
                all_reduce_max=all_reduce_max,
            )
        answers.append(decision and decision.cause.name)
    return answers


def test_all_ranks_decide_alike(tmp_path: Path) -> None:
    assert run_ranks(2, _rank, str(tmp_path / "stop")) == [[None, "SIGNAL", "KILL_SWITCH"]] * 2
