"""Profiles of some iterations with torch.profiler (`--profile`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch


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


def profile(
    kind: Literal["pt", "pt-full"], steps: tuple[int, int], folder: Path, rank: int, log: Callable[[str], None]
) -> Callable[[int], None]:
    """A function to be called after every iteration with its number, which writes a Chrome trace of the iterations.

    Args:
        kind: "pt" records operators; "pt-full" also shapes, memory and call stacks, which slows the run down.
        steps: first and last iteration.
        folder: where `rank<N>.trace.json` is written.
        rank: of this process.
        log: told where the trace is.
    """
    first, last = steps
    full = kind == "pt-full"
    running: list[Any] = []

    def start() -> None:
        profiler = torch.profiler.profile(record_shapes=full, profile_memory=full, with_stack=full)
        profiler.start()
        running.append(profiler)

    def after(iteration: int) -> None:
        if iteration == first - 1:
            start()
        elif iteration == last and running:
            profiler = running.pop()
            profiler.stop()
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank{rank}.trace.json"
            profiler.export_chrome_trace(str(path))
            log(f"profile of iterations {first} to {last} of rank {rank}: {path}")

    if first == 1:
        start()
    return after
