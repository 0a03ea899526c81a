"""Every layout and engine trains with the numbers of one process; the whole matrix is in docs/parity.md."""

from __future__ import annotations

import pytest

from tests.parity import ENGINES, SHALLOW, SHORT, Layout, agrees, curve, difference, layout_of, one_process

BFLOAT16_TOLERANCE = 5e-3
"""Relative, of the loss: activations have 8 bits, and other layouts round sums of them in another order."""

QUICK = (("TP2 SP", "native stage 1"), ("TP2", "DeepSpeed ZeRO-1"))
TELLING = ("native stage 0", "DeepSpeed ZeRO-1", "DeepSpeed ZeRO-3")
"""Without data parallelism there is nothing to shard: further stages run the same code."""
FURTHER = tuple(
    (layout.name, engine)
    for layout in SHALLOW
    for engine in layout.engines
    if ("DP" in layout.name or engine in TELLING) and (layout.name, engine) not in QUICK
)
CHUNKED = ("--op", "linear_cross_entropy=chunked")
WITHOUT_LOGITS = dict.fromkeys(
    [
        *(("TP2 DP2", "native stage 3"), ("TP2 DP2", "DeepSpeed ZeRO-3"), ("TP2 SP", "DeepSpeed ZeRO-1")),
        *(("DP2", "native stage 0"), ("DP2", "DeepSpeed ZeRO-2")),
    ],
    CHUNKED,
)
"""Some take another way to the loss, with the numbers of the usual one."""
COPIES_OF_HEADS = (
    ("TP4 SP, 2 kv heads", "DeepSpeed ZeRO-3"),
    *(("TP2 SP DP2, 1 kv head", engine) for engine in ("native stage 3", "DeepSpeed ZeRO-2")),
    *(("PP2 TP2 SP, 1 kv head", "DeepSpeed ZeRO-1"), ("PP2 TP2 zero-bubble, 1 kv head", "native stage 1")),
)


@pytest.mark.parametrize(("layout", "engine"), QUICK)
def test_layout_equals_one_process(layout: str, engine: str) -> None:
    assert agrees(layout_of(layout), engine, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "engine"), FURTHER + COPIES_OF_HEADS)
def test_every_layout_and_engine_equals_one_process(layout: str, engine: str) -> None:
    assert agrees(layout_of(layout), engine, SHORT, WITHOUT_LOGITS.get((layout, engine), ()))


def test_losses_without_logits_are_tried() -> None:
    assert set(FURTHER) >= WITHOUT_LOGITS.keys()


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
    found = curve(layout_of(layout), (*ENGINES[engine], "--bf16"), SHORT)
    assert difference(found.losses, one_process(steps=SHORT).losses) <= BFLOAT16_TOLERANCE


@pytest.mark.slow
def test_hybrid_sharding_equals_one_process() -> None:
    flags = ("--use-distributed-optimizer", "--num-distributed-optimizer-instances", "2")
    assert agrees(Layout("DP4", 4, flags), "", SHORT)


def test_difference_notices_a_change_and_a_nan() -> None:
    assert difference((1.0, 2.0), (1.0, 2.0)) == 0.0
    assert difference((1.0, 2.1), (1.0, 2.0)) == pytest.approx(0.05)
    assert difference((float("nan"),), (1.0,)) == float("inf")
