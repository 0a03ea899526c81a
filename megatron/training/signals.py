"""When to leave the training loop before its end, agreed between all ranks.

A rank that leaves alone leaves the others waiting in a collective. So each rank says what it knows (a signal arrived,
the time is up, the kill-switch file exists) as a number, the largest over all ranks wins, and all ranks act on it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType


class SignalError(ValueError):
    """A signal that does not exist or cannot be waited for."""


class Cause(IntEnum):
    """Why to leave; of several the largest wins."""

    NONE = 0
    INTERVAL = 1
    DURATION = 2
    SIGNAL = 3
    KILL_SWITCH = 4
    SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class ExitRules:
    """What ends a run early.

    Attributes:
        on_signal: the signal to wait for (`--exit-signal-handler`, `--exit-signal`); None leaves signals alone.
        after_minutes: `--exit-duration-in-mins`.
        every: `--exit-interval`: leave after an iteration divisible by it.
        kill_switch: `--kill-switch-path`: leave when this file exists. Only rank 0 looks, for on a network file
            system ranks may see a new file at different times. It is never removed.
        after_samples: `--stop-after-num-samples`.
    """

    on_signal: signal.Signals | None = None
    after_minutes: float | None = None
    every: int | None = None
    kill_switch: Path | None = None
    after_samples: int | None = None

    @property
    def must_agree(self) -> bool:
        """Whether a rule depends on something that ranks may see differently."""
        return self.on_signal is not None or self.after_minutes is not None or self.kill_switch is not None


def parse_signal(name: str | int) -> signal.Signals:
    """The signal of a name (`SIGTERM`, `TERM`, `15`).

    Raises:
        SignalError: there is no such signal, or a process cannot catch it.
    """
    text = str(name).upper()
    known = {member.name: member for member in signal.Signals}
    if text.isdigit():
        found = next((member for member in known.values() if member.value == int(text)), None)
    else:
        found = known.get(text) or known.get("SIG" + text)
    if found is None:
        raise SignalError(f"--exit-signal is {name!r}; allowed: {', '.join(known)}")
    if found in (signal.SIGKILL, signal.SIGSTOP):
        raise SignalError(
            f"--exit-signal is {found.name}, which a process cannot catch; use SIGTERM, SIGINT or SIGUSR1"
        )
    return found


class SignalFlag:
    """Remembers that a signal arrived, instead of dying from it, while used as a context.

    Repeated signals do nothing more: launchers send SIGTERM to the whole process group and again to each worker, and a
    checkpoint that is being written must be able to finish.
    """

    def __init__(self, on_signal: signal.Signals | None) -> None:
        self._signal = on_signal
        self._previous: object = None
        self.received = False

    def __enter__(self) -> SignalFlag:
        if self._signal is not None:
            self._previous = signal.signal(self._signal, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._signal is not None:
            signal.signal(self._signal, self._previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def local_cause(
    rules: ExitRules, *, rank: int, iteration: int, samples: int = 0, minutes: float, received: bool
) -> Cause:
    """What this rank knows.

    Args:
        rules: what ends the run.
        rank: this rank.
        iteration: iterations done.
        samples: samples trained on.
        minutes: time since the program started.
        received: whether the signal arrived here.
    """
    if rules.after_samples is not None and samples >= rules.after_samples:
        return Cause.SAMPLES
    if rank == 0 and rules.kill_switch is not None and rules.kill_switch.exists():
        return Cause.KILL_SWITCH
    if received:
        return Cause.SIGNAL
    if rules.after_minutes is not None and minutes > rules.after_minutes:
        return Cause.DURATION
    if rules.every is not None and iteration > 0 and iteration % rules.every == 0:
        return Cause.INTERVAL
    return Cause.NONE


@dataclass(frozen=True)
class Exit:
    """The decision to leave, the same on all ranks.

    Attributes:
        cause: why.
        message: what Megatron logs, without the date.
    """

    cause: Cause
    message: str


def decide_exit(
    rules: ExitRules,
    *,
    rank: int,
    iteration: int,
    samples: int = 0,
    minutes: float,
    received: bool,
    all_reduce_max: Callable[[int], int],
) -> Exit | None:
    """Whether all ranks leave now. Called by all ranks after every iteration, and before the first one of this program.

    Args:
        rules: what ends the run; the same on all ranks.
        rank: this rank.
        iteration: iterations done; 0 before the first one of this program, wherever the run is.
        samples: samples trained on.
        minutes: time since the program started.
        received: whether the signal arrived here.
        all_reduce_max: the largest value over all ranks. Not called when the rules only depend on the iteration.
    """
    known = local_cause(rules, rank=rank, iteration=iteration, samples=samples, minutes=minutes, received=received)
    agreed = Cause(all_reduce_max(int(known))) if rules.must_agree else known
    if agreed is Cause.NONE:
        return None
    messages = {
        Cause.INTERVAL: f"exiting program at iteration {iteration}",
        Cause.DURATION: f"exiting program after {minutes:.1f} minutes",
        Cause.SIGNAL: f"exiting program after receiving {rules.on_signal.name if rules.on_signal else 'a signal'}.",
        Cause.SAMPLES: f"exiting program after {samples} samples",
        Cause.KILL_SWITCH: f"Detected kill switch at {rules.kill_switch}. Exiting",
    }
    return Exit(agreed, messages[agreed])
