"""Profiles of some iterations with torch.profiler or the profiler of the device's vendor (`--profile`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

Recorder = Callable[[], Callable[[], str]]
"""Starts to record; what it returns stops that and says where the trace is."""


class ProfileError(ValueError):
    """A range of iterations that cannot be profiled."""


def parse_steps(text: str) -> tuple[int, int]:
    """`first,last` of `--profile_steps`, counted from 1.

    Raises:
        ProfileError: it is not two numbers in order.
    """
    try:
        first, last = (int(part) for part in text.split(","))
    except ValueError:
        raise ProfileError(f"--profile_steps is {text!r}; it must be first,last such as 2,3") from None
    if not 1 <= first <= last:
        raise ProfileError(f"--profile_steps is {text!r}; it needs 1 <= first <= last")
    return first, last


def torch_recorder(kind: Literal["pt", "pt-full"], path: Path) -> Recorder:
    """Records with torch.profiler into a Chrome trace.

    Args:
        kind: "pt" records operators; "pt-full" also shapes, memory and call stacks, which slows the run down.
        path: of the trace.
    """
    full = kind == "pt-full"

    def start() -> Callable[[], str]:
        profiler = torch.profiler.profile(record_shapes=full, profile_memory=full, with_stack=full)
        profiler.start()

        def stop() -> str:
            profiler.stop()
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            return str(path)

        return stop

    return start


def profile(recorder: Recorder, steps: tuple[int, int], rank: int, log: Callable[[str], None]) -> Callable[[int], None]:
    """A function to be called after every iteration with its number, which records the wanted iterations.

    Args:
        recorder: does it.
        steps: first and last iteration.
        rank: of this process.
        log: told where the trace is.
    """
    first, last = steps
    running = [recorder()] if first == 1 else []

    def after(iteration: int) -> None:
        if iteration == first - 1:
            running.append(recorder())
        elif iteration == last and running:
            log(f"profile of iterations {first} to {last} of rank {rank}: {running.pop()()}")

    return after
