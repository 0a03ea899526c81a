"""The matrix products of a linear layer in 8 bits, whatever multiplies two matrices of such numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import checks
from megatron.ops.float8 import Formats, cast

Multiply = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
"""From 8-bit a [m, k] and b [n, k], their scales and a dtype: what a b^T stands for, [m, n] in that dtype."""


def check_arguments(x: Tensor, weight: Tensor, features: tuple[int, int], rows: int) -> None:
    """X [..., i] and weight [o, i] of one dtype, `features` (i, o), and x has a multiple of `rows` rows.

    Raises:
        ValueError: they are not.
    """
    checks.linear_arguments(x, weight, *features)
    found = x.numel() // features[0]
    if found % rows:
        raise ValueError(
            f"--fp8-format: a micro-batch has {found} tokens; 8-bit products take multiples of {rows} "
            "(--micro-batch-size times --seq-length)"
        )


class EightBitProduct:
    """What `reference.make_linear` defines; of the input the 8-bit form is kept for backward.

    Args:
        in_features: i.
        out_features: o.
        formats: of the numbers.
        multiply: the product of two matrices.
        rows: a number that the rows of the input must be a multiple of.
    """

    def __init__(
        self, in_features: int, out_features: int, formats: Formats, multiply: Multiply, *, rows: int = 1
    ) -> None:
        self._features, self._formats, self._multiply, self._rows = (in_features, out_features), formats, multiply, rows
        self._weight: Tensor | None = None

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
        """See `float8.Product`."""
        check_arguments(x, weight, self._features, self._rows)
        if new_weight:
            self._weight = cast(weight.detach(), weight_scale, self._formats.forward)
        kept = None if new_weight is None else self._weight
        result: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x, weight, x_scale, weight_scale, gradient_scale, kept, self._formats, self._multiply
        )
        return result

    def weight_gradient(self, x: Tensor, gradient: Tensor, x_scale: Tensor, gradient_scale: Tensor) -> Tensor:
        """See `float8.SplitProduct`."""
        formats = self._formats
        if not formats.weight_gradient:
            return gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        g8, x8 = cast(gradient, gradient_scale, formats.gradient), cast(x, x_scale, formats.forward)
        return _of_weight(g8, x8, gradient_scale, x_scale, self._multiply, gradient.dtype)


def _of_weight(g8: Tensor, x8: Tensor, g_scale: Tensor, x_scale: Tensor, by: Multiply, dtype: torch.dtype) -> Tensor:
    return by(g8.flatten(0, -2).t(), x8.flatten(0, -2).t(), g_scale, x_scale, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor,
        weight_scale: Tensor,
        gradient_scale: Callable[[Tensor], Tensor],
        kept: Tensor | None,
        formats: Formats,
        multiply: Multiply,
    ) -> Tensor:
        # What is kept over micro-batches belongs to none of them: hooks for what a forward pass saves must not see it.
        ctx.gradient_scale, ctx.kept, ctx.formats, ctx.multiply = gradient_scale, kept, formats, multiply
        x8 = cast(x, x_scale, formats.forward)
        w8 = cast(weight, weight_scale, formats.forward) if kept is None else kept
        saved = (x8 if formats.weight_gradient else x) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(saved, weight if kept is None else None, x_scale, weight_scale)
        result = multiply(x8.flatten(0, -2), w8, x_scale, weight_scale, x.dtype)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight, x_scale, weight_scale = ctx.saved_tensors
        formats, multiply, scale = ctx.formats, ctx.multiply, ctx.gradient_scale(grad)
        g8 = cast(grad, scale, formats.gradient)
        w8 = cast(weight, weight_scale, formats.forward) if ctx.kept is None else ctx.kept
        grad_x = multiply(g8.flatten(0, -2), w8.t(), scale, weight_scale, grad.dtype)
        grad_weight = None
        if saved is not None and formats.weight_gradient:
            grad_weight = _of_weight(g8, saved, scale, x_scale, multiply, grad.dtype)
        elif saved is not None:
            grad_weight = grad.flatten(0, -2).t() @ saved.flatten(0, -2)
        return grad_x.view(*grad.shape[:-1], -1), grad_weight, *(None,) * 6
