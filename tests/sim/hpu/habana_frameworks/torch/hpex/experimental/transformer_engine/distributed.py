"""SIMULATION of transformer_engine.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class _Recompute:
    enabled = False


def is_fp8_activation_recompute_enabled() -> bool:
    """Whether layers run under `activation_checkpointing`."""
    return _Recompute.enabled


@contextlib.contextmanager
def activation_checkpointing() -> Iterator[None]:
    """Forward passes in here are run again in backward, and then must not measure again."""
    before, _Recompute.enabled = _Recompute.enabled, True
    try:
        yield
    finally:
        _Recompute.enabled = before
