"""Linear layers of 8-bit numbers through `torch._scaled_mm`, which torch has had with this signature since 2.5.

Its kernels take the first matrix by rows and the second by columns, 16 bytes at a time, at least one of E4M3; scales
are float32 scalars that the product is multiplied by. torch checks some of that on some devices; it runs on CPUs, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import checks, float8
from megatron.ops.float8 import Formats, Product

_ROWS = 16


def make(in_features: int, out_features: int, formats: Formats) -> Product:
    """See `reference.make_linear`.

    Raises:
        ValueError: a product would be of E5M2 numbers alone.
    """
    if formats.forward.dtype == torch.float8_e5m2:
        raise ValueError("--fp8-format e5m2: this device multiplies E5M2 with E4M3 only; use hybrid or e4m3")

    def product(
        x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, gradient_scale: Callable[[Tensor], Tensor]
    ) -> Tensor:
        checks.linear_arguments(x, weight, in_features, out_features)
        if x.numel() // in_features % _ROWS:
            raise ValueError(
                f"--fp8-format: a micro-batch has {x.numel() // in_features} tokens; 8-bit products take multiples of "
                f"{_ROWS} (--micro-batch-size times --seq-length)"
            )
        result: Tensor = _Linear.apply(x, weight, x_scale, weight_scale, gradient_scale, formats)  # type: ignore[no-untyped-call]
        return result

    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor,
        weight_scale: Tensor,
        gradient_scale: Callable[[Tensor], Tensor],
        formats: Formats,
    ) -> Tensor:
        ctx.gradient_scale, ctx.formats = gradient_scale, formats
        x8 = float8.cast(x, x_scale, formats.forward)
        ctx.save_for_backward(x8 if formats.weight_gradient else x, weight, x_scale, weight_scale)
        w8 = float8.cast(weight, weight_scale, formats.forward)
        result = _multiply(x8.flatten(0, -2), w8, x_scale, weight_scale, x.dtype)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, x_scale, weight_scale = ctx.saved_tensors
        formats, scale = ctx.formats, ctx.gradient_scale(grad)
        g8 = float8.cast(grad, scale, formats.gradient).flatten(0, -2)
        w8 = float8.cast(weight, weight_scale, formats.forward)
        grad_x = _multiply(g8, w8.t(), scale, weight_scale, grad.dtype).view(kept.shape)
        if formats.weight_gradient:
            grad_weight = _multiply(g8.t(), kept.flatten(0, -2).t(), scale, x_scale, weight.dtype)
        else:
            grad_weight = grad.flatten(0, -2).t() @ kept.flatten(0, -2)
        return grad_x, grad_weight, None, None, None, None


def _multiply(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of what 8-bit a [m, k] and the transpose of b [n, k] stand for: [m, n] in `dtype`."""
    scales = a_scale.reciprocal(), b_scale.reciprocal()
    result: Tensor = torch._scaled_mm(a.contiguous(), b.contiguous().t(), *scales, out_dtype=dtype)
    return result
