"""Every layout and engine trains with the numbers of one process; the whole matrix is in docs/parity.md."""

from __future__ import annotations

import functools

import pytest

from tests.parity import ENGINES, FLOAT32_TOLERANCE, LAYOUTS, MODEL, Curve, Layout, curve, difference, one_process

SHORT = 6
BFLOAT16_TOLERANCE = 5e-3
"""Relative, of the loss: activations have 8 bits, and other layouts round sums of them in another order."""

QUICK = (
    *(("TP2 SP", "native stage 1"), ("TP2", "DeepSpeed ZeRO-1"), ("DP2", "native stage 3")),
    *(("PP2 1f1b", "native stage 1"), ("PP2 DP2 zbv, tied embeddings", "native stage 1")),
)
ALL = tuple((layout.name, engine) for layout in LAYOUTS for engine in layout.engines)


def _layout(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)


@functools.cache
def _plain(steps: int, model: tuple[str, ...] = MODEL) -> Curve:
    return one_process(model, steps)


def _check(name: str, engine: str, steps: int) -> None:
    layout = _layout(name)
    found, expected = curve(layout, ENGINES[engine], steps), _plain(steps, layout.model)
    assert difference(found.losses, expected.losses) <= FLOAT32_TOLERANCE
    assert difference(found.norms, expected.norms) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(("layout", "engine"), QUICK)
def test_layout_equals_one_process(layout: str, engine: str) -> None:
    _check(layout, engine, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "engine"), [pair for pair in ALL if pair not in QUICK])
def test_every_layout_and_engine_equals_one_process(layout: str, engine: str) -> None:
    _check(layout, engine, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "engine"),
    [
        ("1 process", "native stage 0"),
        ("TP2 SP", "native stage 0"),
        ("DP2", "native stage 0"),
        ("DP2", "native stage 3"),
        ("DP2", "DeepSpeed ZeRO-1"),
    ],
)
def test_bfloat16_follows_float32(layout: str, engine: str) -> None:
    found = curve(_layout(layout), (*ENGINES[engine], "--bf16"), SHORT)
    assert difference(found.losses, _plain(SHORT).losses) <= BFLOAT16_TOLERANCE


@pytest.mark.slow
def test_hybrid_sharding_equals_one_process() -> None:
    flags = ("--use-distributed-optimizer", "--num-distributed-optimizer-instances", "2")
    found = curve(Layout("DP4", 4), flags, SHORT)
    assert difference(found.losses, _plain(SHORT).losses) <= FLOAT32_TOLERANCE
    assert difference(found.norms, _plain(SHORT).norms) <= FLOAT32_TOLERANCE


def test_difference_notices_a_change_and_a_nan() -> None:
    assert difference((1.0, 2.0), (1.0, 2.0)) == 0.0
    assert difference((1.0, 2.1), (1.0, 2.0)) == pytest.approx(0.05)
    assert difference((float("nan"),), (1.0,)) == float("inf")
