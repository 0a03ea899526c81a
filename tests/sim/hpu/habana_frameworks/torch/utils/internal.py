"""SIMULATION of habana_frameworks.torch.utils.internal."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable


@functools.cache
def is_lazy() -> bool:
    """Lazy unless PT_HPU_LAZY_MODE is "0"; read once per process, as in the real package (1.19)."""
    return os.environ.get("PT_HPU_LAZY_MODE", "1") != "0"


def lazy_only(function: Callable[..., None]) -> Callable[..., None]:
    """Outside of lazy mode the function does nothing."""

    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> None:
        if is_lazy():
            function(*args, **kwargs)

    return wrapper
