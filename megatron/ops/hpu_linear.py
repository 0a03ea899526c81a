"""Linear layers of 8-bit numbers through Gaudi's transformer engine.

Contract: the package's public interface and the vendor's public tests of it, as in Gaudi's bridge 1.19; it is not
published itself. Its layer keeps scales of its own, which change with every forward pass it measures in. Here it never
measures: it is given the scales of the step, and that of a gradient when backward arrives with the gradient. It makes
the 8-bit form of a weight when it is told that a micro-batch is the first one with it, and keeps that form itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron.ops import checks
from megatron.ops.float8 import Formats, Product

_PACKAGE = "habana_frameworks.torch.hpex.experimental.transformer_engine"
_NAMES = {
    (torch.float8_e4m3fn, torch.float8_e5m2): "HYBRID",
    (torch.float8_e5m2, torch.float8_e5m2): "E5M2",
}


def unavailable() -> str:
    """Why there is no such engine here; empty when there is one."""
    if find_spec("habana_frameworks") is None:
        return "python package habana_frameworks is not installed"
    try:
        importlib.import_module(_PACKAGE)
    except ImportError as error:
        return f"{_PACKAGE}: {error}"
    return ""


def make(in_features: int, out_features: int, formats: Formats) -> Product:
    """See `reference.make_linear`; in backward the engine takes E5M2 forms of input and weight.

    Raises:
        ValueError: the engine does not compute with such formats.
    """
    name = _NAMES.get((formats.forward.dtype, formats.gradient.dtype))
    if name is None:
        raise ValueError("--fp8-format e4m3: Gaudi's transformer engine has E5M2 gradients; use hybrid or e5m2")
    if not formats.weight_gradient:
        raise ValueError("--no-fp8-wgrad: Gaudi's transformer engine has 8-bit weight gradients; leave the flag out")
    engine = importlib.import_module(_PACKAGE)
    recipe = engine.recipe.DelayedScaling(fp8_format=engine.recipe.Format[name], reduce_amax=False)
    return _Linear(engine, recipe, in_features, out_features)


class _Linear:
    def __init__(self, engine: ModuleType, recipe: Any, in_features: int, out_features: int) -> None:
        self._engine, self._recipe, self._features = engine, recipe, (in_features, out_features)
        self._layer = engine.Linear(in_features, out_features, bias=False, skip_weight_param_allocation=True)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor,
        weight_scale: Tensor,
        gradient_scale: Callable[[Tensor], Tensor],
        *,
        new_weight: bool | None = None,
    ) -> Tensor:
        checks.linear_arguments(x, weight, *self._features)
        _set_scales(self._layer, "scaling_fwd", torch.stack((x_scale, weight_scale)))
        with self._engine.fp8_autocast(enabled=True, force_measurement=False, fp8_recipe=self._recipe):
            result = self._layer(x, weight, is_first_microbatch=new_weight)
        scaled: Tensor = _ScaleGradient.apply(result, self._layer, gradient_scale)  # type: ignore[no-untyped-call]
        return scaled


class _ScaleGradient(torch.autograd.Function):
    """Passes a layer's result on, and in backward tells the layer the scale of its gradient."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, layer: Any, gradient_scale: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layer, ctx.gradient_scale = layer, gradient_scale
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _set_scales(ctx.layer, "scaling_bwd", ctx.gradient_scale(grad).reshape(1))
        return grad, None, None


def _set_scales(layer: Any, which: str, scales: Tensor) -> None:
    """New tensors: backward passes still need those of other micro-batches."""
    meta = layer.fp8_meta[which]
    meta.scale, meta.scale_inv = scales, scales.reciprocal()
