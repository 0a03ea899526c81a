"""A resumed run goes on as if it had not been interrupted; other layouts and engines are in test_continuation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import FLOAT32_TOLERANCE, LAYOUTS, Layout, curve, difference

HALF, END = 3, 6
EVALUATING = ("--eval-iters", "1", "--eval-interval", "3")
"""An evaluation right before the checkpoint, for it touches the parameters, too."""
DROPOUT = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")
DEEPSPEED = ("--deepspeed", "--zero-stage", "2")
LAYOUT = {layout.name: layout for layout in LAYOUTS}


def _interrupted(first: Layout, before: tuple[str, ...], second: Layout, after: tuple[str, ...], folder: Path) -> None:
    """Train without a break, then to the half in one layout and on in another; the second halves must agree."""
    whole = curve(first, (*before, *EVALUATING), END)
    saved = ("--save", str(folder), "--save-interval", str(HALF))
    curve(first, (*before, *EVALUATING, *saved), HALF)
    resumed = curve(second, (*after, *EVALUATING, "--load", str(folder), "--exit-on-missing-checkpoint"), END)
    tolerance = 0.0 if (first, before) == (second, after) else FLOAT32_TOLERANCE
    assert len(resumed.losses) == END - HALF
    assert difference(resumed.losses, whole.losses[HALF:]) <= tolerance
    assert difference(resumed.norms, whole.norms[HALF:]) <= tolerance


def test_same_layout_repeats_the_last_bit_with_dropout(tmp_path: Path) -> None:
    flags = ("--bf16", *DROPOUT)
    _interrupted(LAYOUT["DP2"], flags, LAYOUT["DP2"], flags, tmp_path)


@pytest.mark.slow
def test_another_layout_continues(tmp_path: Path) -> None:
    _interrupted(LAYOUT["TP2 SP"], (), LAYOUT["DP2"], ("--zero-stage", "1"), tmp_path)


@pytest.mark.slow
def test_16_bit_weights_of_one_data_rank_repeat_the_last_bit(tmp_path: Path) -> None:
    flags = ("--bf16", *DROPOUT)
    _interrupted(LAYOUT["TP2 SP"], flags, LAYOUT["TP2 SP"], flags, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [DROPOUT, ("--zero-stage", "3"), (*DEEPSPEED, "--bf16")])
def test_same_layout_repeats_the_last_bit(flags: tuple[str, ...], tmp_path: Path) -> None:
    _interrupted(LAYOUT["TP2 DP2"], flags, LAYOUT["TP2 DP2"], flags, tmp_path)
