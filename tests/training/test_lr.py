"""Learning-rate and weight-decay schedules against values computed by hand from the published formulas."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from megatron.training.lr import (
    LrSchedule,
    ScheduleError,
    SchedulePosition,
    build_schedule,
    load_schedule,
    schedule_state,
)

BASE = LrSchedule(max_lr=1.0, min_lr=0.1, warmup=100, decay=1100, wd_incr_samples=1000)


def at(schedule: LrSchedule, samples: int, tokens: int = 0) -> float:
    return schedule.lr(SchedulePosition(samples, tokens))


def test_warmup_is_linear_and_starts_at_its_own_value() -> None:
    assert [at(BASE, n) for n in (0, 25, 100)] == [0.0, 0.25, 1.0]
    raised = replace(BASE, init_lr=0.2)
    assert [at(raised, n) for n in (0, 50, 100)] == pytest.approx([0.2, 0.6, 1.0])


@pytest.mark.parametrize(
    ("style", "quarter", "half", "end"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 0.1 + 0.9 * 0.75, 0.55, 0.1),
        ("cosine", 0.1 + 0.9 * 0.5 * (1 + 0.70710678), 0.55, 0.1),  # cos 45 degrees
        ("inverse-square-root", math.sqrt(100 / 350), math.sqrt(100 / 600), math.sqrt(100 / 1100)),
    ],
)
def test_decay(style: Any, quarter: float, half: float, end: float) -> None:
    """The decay runs from 100 to 1100: a quarter is 350, half is 600."""
    schedule = replace(BASE, style=style)
    assert [at(schedule, n) for n in (350, 600, 1100)] == pytest.approx([quarter, half, end])
    assert at(schedule, 1101) == (1.0 if style == "constant" else 0.1)


@pytest.mark.parametrize(
    ("style", "quarter", "half"),
    [
        ("linear", 0.75, 0.5),
        ("cosine", 0.5 * (1 + 0.70710678), 0.5),
        ("exponential", 2 * 0.84089642 - 1, 2 * 0.70710678 - 1),  # 2^(-1/4) and 2^(-1/2)
        ("minus_sqrt", 0.5, 1 - 0.70710678),
    ],
)
def test_wsd_is_flat_then_falls(style: Any, quarter: float, half: float) -> None:
    """WSD with the last 400 of 1100: flat until 700; a quarter of the fall is 800, half is 900."""
    schedule = replace(BASE, min_lr=0.0, style="WSD", wsd_style=style, wsd_decay=400)
    assert [at(schedule, n) for n in (101, 700, 800, 900, 1100)] == pytest.approx([1.0, 1.0, quarter, half, 0.0])


def test_weight_decay() -> None:
    rising = replace(BASE, start_wd=0.1, end_wd=0.5, wd_style="linear")
    assert [rising.weight_decay(SchedulePosition(n)) for n in (0, 500, 1000, 2000)] == pytest.approx(
        [0.1, 0.3, 0.5, 0.5]
    )
    cosine = replace(rising, wd_style="cosine")
    quarter = 0.1 + 0.4 * 0.5 * (1 - 0.70710678)
    got = [cosine.weight_decay(SchedulePosition(n)) for n in (0, 250, 500, 1000)]
    assert got == pytest.approx([0.1, quarter, 0.3, 0.5])
    assert replace(BASE, start_wd=0.3, end_wd=0.3).weight_decay(SchedulePosition(7)) == 0.3


def build(**flags: Any) -> LrSchedule:
    return build_schedule(**{"lr": 1.0, "global_batch_size": 8, "seq_length": 16, "train_iters": 100, **flags})


def test_iterations_become_samples() -> None:
    schedule = build(lr_warmup_iters=10, lr_decay_iters=50, lr_decay_style="WSD", lr_wsd_decay_iters=5)
    assert (schedule.unit, schedule.warmup, schedule.decay, schedule.wsd_decay) == ("samples", 80, 400, 40)
    assert schedule.wd_incr_samples == 800
    assert at(schedule, 40) == 0.5  # in the middle of the warm-up, 5 of 10 iterations


def test_the_decay_ends_with_the_run_unless_told() -> None:
    assert build().decay == 800
    assert build(train_iters=None, train_samples=500, lr_warmup_samples=50).decay == 500


def test_fraction_of_the_decay() -> None:
    assert build(lr_warmup_fraction=0.01).warmup == pytest.approx(8.0)
    assert build(lr_warmup_fraction=0.5, lr_decay_iters=50).warmup == pytest.approx(200.0)


def test_tokens() -> None:
    schedule = build(lr_decay_tokens=2000, lr_warmup_tokens=1000)
    assert (schedule.unit, schedule.warmup, schedule.decay) == ("tokens", 1000, 2000)
    assert [at(schedule, 7, tokens) for tokens in (500, 1000, 1500, 2001)] == [0.5, 1.0, 0.5, 0.0]


def test_warmup_and_decay_are_measured_in_one_unit() -> None:
    assert build(lr_decay_tokens=2000, lr_warmup_iters=2).warmup == 2 * 8 * 16
    assert build(lr_warmup_tokens=160).decay == 800 * 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_samples": 5}, "--train-samples was given but the run is measured by --train-iters"),
        ({"lr_decay_samples": 5}, "--lr-decay-samples was given .* use --lr-decay-iters"),
        ({"train_iters": None}, "exactly one of --train-iters and --train-samples"),
        ({"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1}, "given by --lr-warmup-fraction and by"),
        ({"lr_warmup_fraction": 1.5}, "--lr-warmup-fraction is 1.5"),
        ({"lr_warmup_iters": 100}, "lasts 800 samples and the decay ends after 800"),
        ({"min_lr": 2.0}, r"--min-lr is 2.0; .* --lr \(1.0\)"),
        ({"lr_warmup_init": 2.0}, "--lr-warmup-init is 2.0"),
        ({"lr_decay_style": "WSD"}, "give --lr-wsd-decay-iters"),
        ({"lr_decay_style": "step"}, "--lr-decay-style is 'step'; allowed: constant, linear"),
        ({"start_weight_decay": 0.1, "end_weight_decay": 0.2}, "use linear or cosine"),
        ({"weight_decay": 0.1, "end_weight_decay": 0.0}, "needs 0 <= --start-weight-decay"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build(**flags)


def test_state_uses_megatrons_names_and_survives_json() -> None:
    position = SchedulePosition(400, 6400)
    schedule = build(lr_warmup_iters=10)
    state = json.loads(json.dumps(schedule_state(schedule, position)))
    megatron = "max_lr lr_warmup_steps num_steps lr_decay_style lr_decay_steps min_lr start_wd end_wd wd_incr_style"
    assert {*megatron.split(), "wd_incr_steps", "num_tokens"} <= set(state)
    assert (state["num_steps"], state["lr_warmup_steps"], state["lr_decay_steps"]) == (400, 80, 800)
    assert load_schedule(schedule, state) == (schedule, position)


def test_state_in_tokens() -> None:
    schedule = build(lr_decay_tokens=2000, lr_warmup_tokens=100)
    state = schedule_state(schedule, SchedulePosition(8, 128))
    assert (state["lr_warmup_tokens"], state["lr_decay_tokens"]) == (100, 2000)
    assert load_schedule(schedule, state) == (schedule, SchedulePosition(8, 128))
    with pytest.raises(ScheduleError, match="unit of the schedule: samples now, tokens in the checkpoint"):
        load_schedule(build(), state)


def test_a_megatron_checkpoint_without_our_names_loads() -> None:
    schedule = build(lr_warmup_init=0.5, lr_warmup_iters=10)
    state = schedule_state(schedule, SchedulePosition(400))
    for ours in ("lr_warmup_init", "lr_wsd_decay_style", "lr_wsd_decay_steps", "num_tokens"):
        del state[ours]
    state.update(lr_warmup_tokens=None, lr_decay_tokens=None)
    assert load_schedule(schedule, state) == (schedule, SchedulePosition(400, 0))


def test_a_different_schedule_is_refused_unless_told_which_one_holds() -> None:
    saved = build(lr_warmup_iters=10, min_lr=0.1)
    longer = build(lr_warmup_iters=10, min_lr=0.2, train_iters=200)
    state = schedule_state(saved, SchedulePosition(400))
    with pytest.raises(ScheduleError) as error:
        load_schedule(longer, state)
    assert "min_lr: 0.2 now, 0.1 in the checkpoint" in str(error.value)
    assert "lr_decay_steps: 1600 now, 800 in the checkpoint" in str(error.value)
    assert "--override-opt_param-scheduler" in str(error.value)
    assert load_schedule(longer, state, override=True) == (longer, SchedulePosition(400))
    assert load_schedule(longer, state, use_checkpoint=True) == (saved, SchedulePosition(400))
    with pytest.raises(ScheduleError, match="exclude each other"):
        load_schedule(longer, state, override=True, use_checkpoint=True)


def test_skipped_steps_do_not_move_the_schedule() -> None:
    position = SchedulePosition().after(8, 128).after(8, 128)
    assert position == SchedulePosition(16, 256)
