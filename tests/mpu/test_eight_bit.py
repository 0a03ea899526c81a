"""Scales that follow from what was seen, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.accelerators.base import FLOAT8
from megatron.mpu.eight_bit import EightBitLinear, EightBitScaling, ScalingRecipe
from megatron.mpu.groups import single_process
from megatron.ops import float8

INPUT, WEIGHT, GRADIENT = range(3)
HYBRID = float8.formats("hybrid", FLOAT8, weight_gradient=True)


def _scaling(**recipe: object) -> EightBitScaling:
    scaling = EightBitScaling(ScalingRecipe(**recipe), HYBRID, single_process(), torch.device("cpu"))  # type: ignore[arg-type]
    assert [scaling.add(name) for name in ("layers.0.mlp.up", "layers.0.mlp.down")] == [0, 1]
    return scaling


def _step(scaling: EightBitScaling, *values: float, layer: int = 0) -> list[float]:
    """Scales used for inputs with these largest values; then the step ends."""
    used = [scaling.scale(layer, INPUT, torch.tensor([value, -value / 2])).item() for value in values]
    scaling.after_step()
    return used


def test_the_first_step_takes_the_values_themselves_and_later_ones_those_before():
    scaling = _scaling(history=1)
    assert _step(scaling, 1.0, 7.0) == [256.0, 64.0]  # 448 / 1 and 448 / 7, down to powers of two
    assert _step(scaling, 100.0, 1.0) == [64.0, 64.0]  # of 7, the largest before
    assert _step(scaling, 1.0) == [4.0]
    assert _step(scaling, 1.0) == [256.0]


def test_gradients_have_their_own_format():
    scaling = _scaling()
    assert scaling.scale(0, GRADIENT, torch.tensor([1e-3])).item() == 2.0 ** math.floor(math.log2(57344.0 / 1e-3))


@pytest.mark.parametrize(
    ("algorithm", "expected"), [("max", [16.0, 16.0, 256.0]), ("most_recent", [16.0, 256.0, 256.0])]
)
def test_history(algorithm, expected):
    scaling = _scaling(history=2, algorithm=algorithm)
    _step(scaling, 28.0)
    assert [_step(scaling, 1.0)[0] for _ in range(3)] == expected


def test_margin_and_interval():
    scaling = _scaling(margin=2, interval=2)
    assert _step(scaling, 1.0) == [64.0]
    assert [_step(scaling, value)[0] for value in (7.0, 7.0, 1.0, 1.0)] == [64.0, 64.0, 16.0, 16.0]


def test_current_scaling_looks_at_nothing_else():
    scaling = _scaling(delayed=False)
    assert [_step(scaling, 1.0, 7.0) for _ in range(2)] == [[256.0, 64.0]] * 2
    assert scaling.tensors() == {}


def test_what_each_rank_measures_for_itself_is_not_saved():
    scaling = _scaling(reduce=False)
    assert _step(scaling, 7.0) == _step(scaling, 1.0) == [64.0]
    assert scaling.tensors() == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_what_is_no_measure_repeats_the_one_before(bad):
    scaling = _scaling(history=2)
    _step(scaling, 7.0)
    _step(scaling, bad, 1.0) if bad else _step(scaling, bad)
    assert _step(scaling, 1.0) == [64.0]


def test_weights_are_cast_once_per_step_where_they_are_kept():
    news = []

    class Product:
        def __call__(self, x, weight, x_scale, weight_scale, gradient_scale, *, new_weight=None):
            news.append((new_weight, weight_scale.item()))
            return x

    for keep in (True, False):
        scaling = _scaling(keep_weights=keep)
        layer = EightBitLinear(Product(), scaling, 0)
        for _ in range(2):
            layer(torch.ones(1), torch.full((1,), 7.0))
            layer(torch.ones(1), torch.full((1,), 7.0))
            scaling.after_step()
    assert news == [(True, 64.0), (False, 64.0)] * 2 + [(None, 64.0)] * 4


def test_checkpoints_hold_the_history_by_logical_name():
    whole, first, second = (_scaling(history=3, algorithm="max", interval=2) for _ in range(3))
    for value in (3.0, 1.0, 5.0):
        _step(whole, value)
        _step(first, value)
    saved = first.tensors()
    assert set(saved) == {"fp8.steps", "fp8.layers.0.mlp.up.amax", "fp8.layers.0.mlp.down.amax"}
    assert saved["fp8.layers.0.mlp.up.amax"].shape == (3, 3)
    for name, tensor in second.tensors().items():
        tensor.copy_(saved[name])
    second.refresh()
    for value in (9.0, 1.0, 1.0, 1.0):
        assert _step(second, value) == _step(whole, value)
