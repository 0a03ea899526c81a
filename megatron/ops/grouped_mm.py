"""Products of groups of rows by `torch.nn.functional.grouped_mm`: one kernel, and no number of rows comes to the host.

Its kernels take bfloat16, 16 bytes at a time, from matrices with contiguous rows or columns; ends of groups are int32.
Legend: m=rows of all groups, E=groups, i, o=width of rows before and after.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TOLERANCE = {torch.bfloat16: 2e-2}
"""Sums are float32 and rounded once, as in one product per group."""
_WIDTHS = 8  # numbers in 16 bytes


def why_unavailable() -> str:
    """Why this torch cannot; empty when it can."""
    return "" if hasattr(F, "grouped_mm") else f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `reference.grouped_matmul`; x [m, i] and weight [E, o, i] are bfloat16, i and o multiples of 8.

    Raises:
        ValueError: they are not.
    """
    if x.dtype not in TOLERANCE:
        raise ValueError(f"--op grouped_matmul=grouped_mm computes in bfloat16, not {x.dtype}: use --bf16")
    widths = list(weight.shape[1:])
    if any(width % _WIDTHS for width in widths):
        raise ValueError(
            f"--op grouped_matmul=grouped_mm takes widths that are multiples of {_WIDTHS}, not {widths} "
            "(--hidden-size, and --moe-ffn-hidden-size over --tensor-model-parallel-size)"
        )
    if x.shape[0] == 0:
        return x @ weight[0].t()  # the kernels take no empty matrix
    ends = counts.cumsum(0).to(torch.int32)
    result: Tensor = _GroupedMatmul.apply(x.contiguous(), weight.contiguous(), ends)  # type: ignore[no-untyped-call]
    return result


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()  # that of a sum has strides of 0
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad, weight, offs=ends)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad.t(), x, offs=ends)
            # Not every kernel writes the matrices of groups without rows: pytorch/pytorch issue 172439.
            empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
            grad_weight = grad_weight.masked_fill_(empty[:, None, None], 0.0)
        return grad_x, grad_weight, None
