"""Named timers with levels, under the names that Megatron logs.

A timer above `--timing-log-level` is a shared object that does nothing: no synchronisation, no clock. A timer that runs
waits for the device at both ends, so that the time of a region is its own; measuring therefore costs speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType, TracebackType
from typing import Literal

LogOption = Literal["max", "minmax", "all"]

TIMER_LEVELS: Mapping[str, int] = MappingProxyType(
    {
        "interval-time": 0,
        "model-and-optimizer-setup": 0,
        "train/valid/test-data-iterators-setup": 0,
        "load-checkpoint": 0,
        "save-checkpoint": 0,
        "eval-time": 0,
        "forward-backward": 1,
        "layernorm-grads-all-reduce": 1,
        "embedding-grads-all-reduce": 1,
        "grads-all-reduce": 1,
        "grads-reduce-scatter": 1,
        "params-all-gather": 1,
        "optimizer-copy-to-main-grad": 1,
        "optimizer-unscale-and-check-inf": 1,
        "optimizer-clip-main-grad": 1,
        "optimizer-count-zeros": 1,
        "optimizer-inner-step": 1,
        "optimizer-copy-main-to-model-params": 1,
        "optimizer": 1,
        "batch-generator": 2,
        "forward-compute": 2,
        "backward-compute": 2,
        "forward-recv": 2,
        "forward-send": 2,
        "backward-recv": 2,
        "backward-send": 2,
        "forward-send-forward-recv": 2,
        "forward-send-backward-recv": 2,
        "backward-send-forward-recv": 2,
        "backward-send-backward-recv": 2,
        "forward-backward-send-forward-backward-recv": 2,
    }
)
"""The level from which on a timer runs. Adding a timer is adding a row."""

_NAME_WIDTH = 48
_MILLISECONDS = 1000.0


class Timer:
    """Sums the seconds between its starts and stops."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._started: float | None = None
        self._total = 0.0

    def __enter__(self) -> None:
        if self._started is not None:
            raise RuntimeError("the timer already runs")
        self._synchronize()
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._started is not None
        if error is None:  # Waiting for a device that has just failed may never end.
            self._synchronize()
        self._total += time.perf_counter() - self._started
        self._started = None

    def take(self) -> float:
        """The seconds so far; the sum starts again at zero. A running timer goes on running."""
        if self._started is not None:
            self.__exit__(None, None, None)
            self.__enter__()
        total, self._total = self._total, 0.0
        return total


class Timers:
    """The timers of one rank.

    Args:
        level: `--timing-log-level`: 0, 1 or 2.
        synchronize: waits until the device has finished its work.
        barrier: waits for all ranks; called before each start and stop of a level-1 timer, so that its time does not
            contain waiting for others. None with `--no-barrier-with-level-1-timing`.
    """

    def __init__(
        self, level: int = 0, *, synchronize: Callable[[], None], barrier: Callable[[], None] | None = None
    ) -> None:
        if level not in (0, 1, 2):
            raise ValueError(f"--timing-log-level is {level}; allowed: 0, 1, 2")
        self._level = level
        self._synchronize = synchronize
        self._barrier = barrier
        self._timers: dict[str, Timer] = {}
        self._nothing: AbstractContextManager[None] = nullcontext()

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """The timer of that name: `with timers("optimizer"): ...`.

        Raises:
            KeyError: `name` is not in `TIMER_LEVELS`.
        """
        level = TIMER_LEVELS[name]
        if level > self._level:
            return self._nothing
        if name not in self._timers:
            self._timers[name] = Timer(self._wait_for_all if level == 1 and self._barrier else self._synchronize)
        return self._timers[name]

    def _wait_for_all(self) -> None:
        assert self._barrier is not None
        self._barrier()
        self._synchronize()

    def take(self, names: Sequence[str]) -> list[float]:
        """Seconds per name since the last call, 0 for a timer that did not run. The sums start again at zero."""
        return [self._timers[name].take() if name in self._timers else 0.0 for name in names]


def running_timers(level: int) -> list[str]:
    """The names that run at `--timing-log-level level`: the same list on every rank, whatever the rank has timed."""
    return [name for name, needed in TIMER_LEVELS.items() if needed <= level]


def timers_report(
    names: Sequence[str], seconds: Sequence[Sequence[float]], option: LogOption = "minmax", *, steps: int = 1
) -> str | None:
    """The text that Megatron logs for timers.

    Args:
        names: names of the timers.
        seconds: for every rank, its seconds per name. 0 means that the timer did not run there, and such ranks are
            left out of the minimum.
        option: `--timing-log-option`.
        steps: iterations the seconds belong to; the text shows the time of one.

    Returns:
        None if no timer ran on any rank.
    """
    lines = []
    for column, name in enumerate(names):
        times = {rank: row[column] * _MILLISECONDS / steps for rank, row in enumerate(seconds) if row[column] > 0.0}
        if not times:
            continue
        dotted = (name + " ").ljust(_NAME_WIDTH, ".")
        if option == "all":
            lines += [f"  {name}:", *(f"     rank {rank:2d}: {value:.2f}" for rank, value in times.items())]
        elif option == "max":
            lines.append(f"    {dotted}: {max(times.values()):.2f}")
        else:
            lines.append(f"    {dotted}: ({min(times.values()):.2f}, {max(times.values()):.2f})")
    heading = {"all": "times", "max": "max time", "minmax": "(min, max) time"}[option]
    return "\n".join([f"{heading} across ranks (ms):", *lines]) if lines else None
