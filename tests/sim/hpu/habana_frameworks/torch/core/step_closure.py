"""SIMULATION of habana_frameworks.torch.core.step_closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from habana_frameworks.torch.utils.internal import is_lazy, lazy_only
from tests.sim import runtime


@lazy_only
def mark_step(device_str: str = "", sync: bool = False) -> None:
    """In the real package: hand the operations gathered so far to the device as one graph."""
    runtime.library("hpu").count_event("mark_step")


@lazy_only
def iter_mark_step(device_str: str = "") -> None:
    """Like `mark_step`."""
    runtime.library("hpu").count_event("mark_step")


@lazy_only
def add_step_closure(closure: Callable[..., Any], args: tuple[Any, ...] = ()) -> None:
    """In the real package: called after the next `mark_step`; here at once, as every value is there already."""
    closure(*args)


def _mark_step_if_lazy(device_str: str = "") -> None:
    if is_lazy():
        mark_step(device_str)
