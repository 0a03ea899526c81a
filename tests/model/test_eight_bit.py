"""Layers of a model that compute in 8 bits: gradients of weights that are left for later, or cannot be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from megatron.accelerators.base import FLOAT8
from megatron.model.eight_bit import use_eight_bit
from megatron.mpu.deferred import DeferredGradients
from megatron.mpu.eight_bit import EightBitScaling, ScalingRecipe
from megatron.mpu.groups import single_process
from megatron.mpu.layers import ColumnParallelLinear, column_linears
from megatron.ops import Ops, UnavailableOpError, float8, reference_ops


def _layers(deferred: DeferredGradients | None, ops: Ops, *, weight_gradient: bool = True) -> nn.Module:
    """A module with two layers of one input, as attention has them."""
    generator, groups = torch.Generator().manual_seed(0), single_process()
    model = nn.Module()
    model.layers = nn.ModuleDict()
    for name in ("key", "value"):
        layer = ColumnParallelLinear(32, 16, bias=True, group=groups.tp, deferred=deferred)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
        model.layers[name] = layer
    formats = float8.formats("hybrid", FLOAT8, weight_gradient=weight_gradient)
    use_eight_bit(model, EightBitScaling(ScalingRecipe(), formats, groups, torch.device("cpu")), ops)
    return model


@pytest.mark.parametrize("weight_gradient", [True, False])
def test_gradients_of_weights_that_are_left_for_later_are_the_same(weight_gradient):
    x = torch.randn(16, 1, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for deferred in (None, DeferredGradients()):
        model = _layers(deferred, reference_ops(), weight_gradient=weight_gradient)
        key, value = column_linears(x, list(model.layers.values()))
        x.grad = None
        (key * value).sum().backward()
        if deferred is not None:
            assert model.layers.key.weight.grad is None
            for task in deferred.take():
                task.as_zero().backward()
        found.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for now, later in zip(*found, strict=True):
        assert torch.equal(now, later)


def test_products_that_give_both_gradients_at_once_cannot_wait():
    def make_linear(in_features: int, out_features: int, formats: float8.Formats) -> float8.Product:
        return lambda *arguments, **kwargs: arguments[0]

    ops = dataclasses.replace(reference_ops(), make_linear=make_linear)
    _layers(None, ops)

    def impossible(in_features: int, out_features: int, formats: float8.Formats) -> float8.Product:
        raise ValueError("--fp8-format e4m3: not here")

    with pytest.raises(UnavailableOpError, match="e4m3: not here"):
        _layers(None, dataclasses.replace(ops, make_linear=impossible))
    with pytest.raises(
        UnavailableOpError, match=r"--pipeline-schedule: .* at once; choose one that does not part them"
    ):
        _layers(DeferredGradients(), ops)
