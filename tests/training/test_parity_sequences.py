"""Ranks that share every sequence train with the numbers of one process; the whole matrix is in docs/parity.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.run import parse
from megatron.training.metrics import read_metrics
from tests.parity import (
    ENGINES,
    FLOAT32_TOLERANCE,
    MODEL,
    SEQUENCES,
    SHORT,
    TRAINING,
    Layout,
    agrees,
    curve,
    difference,
    layout_of,
    one_process,
    train,
)
from tests.support import run_ranks
from tests.training.test_parity import BFLOAT16_TOLERANCE

HALF = SHORT // 2
TELLING = (
    *(("CP2", "native stage 0"), ("CP2 DP2", "native stage 3"), ("CP2 TP2 SP", "DeepSpeed ZeRO-1")),
    *(("CP2 PP2", "DeepSpeed ZeRO-1"), ("Ulysses 2 DP2", "DeepSpeed ZeRO-3"), ("CP2 Ulysses 2", "native stage 1")),
)
"""Of the others, the parts have been shown to work together: the whole matrix is a command."""


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "engine"), TELLING)
def test_shared_sequences_equal_one_process(layout: str, engine: str) -> None:
    assert agrees(layout_of(layout), engine, SHORT)


@pytest.mark.slow
def test_bfloat16_follows_float32() -> None:
    found = curve(layout_of("CP2 Ulysses 2"), ("--zero-stage", "1", "--bf16"), SHORT)
    assert difference(found.losses, one_process(steps=SHORT).losses) <= BFLOAT16_TOLERANCE


def test_layouts_are_known() -> None:
    assert set(TELLING) <= {(layout.name, engine) for layout in SEQUENCES for engine in layout.engines}


def test_megatrons_flag_for_sharing_by_heads_is_the_same() -> None:
    flags = ("--context-parallel-size", "4", "--cp-comm-type", "a2a")
    found = parse([*MODEL, *TRAINING, "--mock-data", "--train-iters", "1", *flags], {"WORLD_SIZE": "8"}).parallel
    assert (found.ring_parallel_size, found.ulysses_parallel_size, found.data_parallel_size) == (1, 4, 2)


def _evaluations(layout: Layout, flags: tuple[str, ...], folder: Path) -> list[float]:
    """Losses of the evaluations of a short run."""
    metrics = folder / f"{layout.name}.jsonl"
    argv = [*layout.model, *TRAINING, "--mock-data", "--train-iters", "4", "--log-json", str(metrics)]
    argv += ["--eval-iters", "2", "--eval-interval", "2", *layout.flags, *flags]
    run_ranks(layout.ranks, train, argv, init=False, timeout=300.0)
    return [record["lm_loss"] for record in read_metrics(metrics) if record["kind"] == "evaluation"]


@pytest.mark.slow
def test_evaluations_equal_those_of_one_process(tmp_path: Path) -> None:
    found = _evaluations(layout_of("CP2"), ENGINES["native stage 3"], tmp_path)
    expected = _evaluations(layout_of("1 process"), (), tmp_path)
    assert len(found) >= 3
    assert difference(found, expected) <= FLOAT32_TOLERANCE


@pytest.mark.slow
def test_a_checkpoint_of_shared_sequences_goes_on_without_sharing(tmp_path: Path) -> None:
    """Saved with CP2, gone on with as DP2: weights and optimizer know nothing of how sequences were shared."""
    saved = ("--save", str(tmp_path), "--save-interval", str(HALF))
    curve(layout_of("CP2"), saved, HALF)
    found = curve(layout_of("DP2"), ("--zero-stage", "1", "--load", str(tmp_path)), SHORT)
    expected = one_process(steps=SHORT)
    assert difference(found.losses, expected.losses[HALF:]) <= FLOAT32_TOLERANCE
    assert difference(found.norms, expected.norms[HALF:]) <= FLOAT32_TOLERANCE
