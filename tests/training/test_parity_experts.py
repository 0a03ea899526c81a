"""Experts spread over ranks train with the numbers of one process; the whole matrix is in docs/parity.md."""

from __future__ import annotations

import pytest

from tests.parity import EXPERTS, SHORT, agrees, layout_of

TELLING = (
    ("EP2 TP2 SP", "native stage 3"),
    ("EP2 PP2 zero-bubble", "native stage 1"),
    ("EP2, capacity 1", "native stage 1"),
    ("EP2, recomputed", "native stage 1"),
    ("EP2 DP4", "DeepSpeed ZeRO-2"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "engine"), TELLING)
def test_layout_equals_one_process(layout: str, engine: str) -> None:
    assert engine in layout_of(layout).engines and layout_of(layout) in EXPERTS
    assert agrees(layout_of(layout), engine, SHORT)
