"""The loss scale goes on after a break, also that of DeepSpeed."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.training.deepspeed import import_deepspeed
from megatron.training.deepspeed_scale import read_scale, write_scale
from megatron.training.loss_scale import LossScale
from tests.support import run_ranks

WINDOW, STEPS = 4, 60


def test_goes_on_by_its_own_rule_where_another_one_had_arrived() -> None:
    saved = LossScale(
        value=512.0, minimum=1.0, window=1000, hysteresis=2, clean_steps=7, overflows_left=1
    ).state()
    own = LossScale.dynamic(65536.0, 2.0, 100, 3)
    expected = LossScale(value=512.0, minimum=2.0, window=100, hysteresis=3, clean_steps=7, overflows_left=1)
    assert own.resumed(saved) == expected


@pytest.mark.parametrize(
    ("own", "saved"),
    [
        (LossScale.dynamic(65536.0, 1.0, 100, 1), LossScale.static(1.0)),
        (LossScale.static(8.0), LossScale.dynamic(65536.0, 1.0, 100, 1)),
    ],
)
def test_a_scale_that_never_changes_says_nothing_about_others(own: LossScale, saved: LossScale) -> None:
    assert own.resumed(saved.state()) == own


def _scaled() -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=WINDOW,
        min_scale=1.0,
        delayed_shift=2,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )
    return SimpleNamespace(loss_scaler=scaler, step=scaler.update_scale)


@pytest.mark.slow
def test_deepspeed_goes_on_as_if_there_had_been_no_break() -> None:
    """Whatever has overflowed before, and wherever the break is."""
    run_ranks(1, _go_on_after_breaks)


def _go_on_after_breaks() -> None:
    # Its scaler asks for the rank before it tells about an overflow.
    import_deepspeed().init_distributed(dist_init_required=False)
    random_ = random.Random(5)
    for _ in range(20):
        overflows = [random_.random() < 0.15 for _ in range(STEPS)]
        whole, scales = _scaled(), []
        for overflow in overflows:
            whole.step(overflow)
            scales.append(read_scale(whole).value)
        for at in range(STEPS):
            before, after = _scaled(), _scaled()
            for overflow in overflows[:at]:
                before.step(overflow)
            write_scale(after, read_scale(after).resumed(read_scale(before).state()))
            for step in range(at, STEPS):
                after.step(overflows[step])
                assert read_scale(after).value == scales[step], (overflows, at, step)
