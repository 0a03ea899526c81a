"""Linear layers of 8-bit numbers through NVIDIA's Transformer Engine, which is given the scales.

Contract: what the engine's documentation lists of `transformer_engine.pytorch` from 2.14 on: `Float8Quantizer`,
`ops.BasicLinear._functional_forward` and `_functional_backward`, `prepare_for_saving` and `restore_from_saved`; read in
the sources of 2.14.1, 2.17.1 and 2.20.2. Its modules, which keep scales of their own, are not used. A quantizer here
serves one cast: it multiplies by the scale that it is given, and what it finds out about the largest value is dropped.
It must make both forms of a tensor, by rows and by columns: before Blackwell the second comes with the first only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import engine_norms, scaled_mm
from megatron.ops.eight_bit_linear import check_arguments
from megatron.ops.float8 import Format, Formats

_PACKAGE = "transformer_engine.pytorch"
_FIRST_VERSION = (2, 14)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def not_installed() -> str:
    """Why there is no such engine here, or too old a one; empty when there is one."""
    return engine_norms.unavailable(_FIRST_VERSION)


def broken() -> str:
    """Why the installed engine cannot be loaded; empty when it can."""
    try:
        importlib.import_module(_PACKAGE)
    except Exception as error:  # parts missing, built for another torch or CUDA: the loader has errors of all kinds
        return f"{_PACKAGE} cannot be imported: {error!r}"
    return ""


class EngineProduct:
    """What `reference.make_linear` defines.

    Args:
        in_features: i.
        out_features: o.
        formats: of the numbers.

    Raises:
        ValueError: a product would be of E5M2 numbers alone.
    """

    def __init__(self, in_features: int, out_features: int, formats: Formats) -> None:
        scaled_mm.check_formats(formats)
        self._features, self._formats = (in_features, out_features), formats
        self._weight: Any = None

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
        check_arguments(x, weight, self._features, scaled_mm.ROWS)
        if x.dtype not in _DTYPES:
            raise ValueError(f"8-bit products come in {', '.join(map(str, _DTYPES))}, not in {x.dtype}")
        if new_weight:
            self._weight = _quantizer(weight, weight_scale, self._formats.forward)(weight.detach())
        kept = None if new_weight is None else self._weight
        result: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x, weight, x_scale, weight_scale, gradient_scale, kept, self._formats
        )
        return result

    def weight_gradient(self, x: Tensor, gradient: Tensor, x_scale: Tensor, gradient_scale: Tensor) -> Tensor:
        """See `float8.SplitProduct`."""
        rows, x_rows = (tensor.flatten(0, -2).contiguous() for tensor in (gradient, x))
        if not self._formats.weight_gradient:
            return rows.t() @ x_rows
        of_x = _quantizer(x, x_scale, self._formats.forward)
        of_gradient = _quantizer(gradient, gradient_scale, self._formats.gradient)
        _, result = _functions()._functional_backward(
            of_gradient(rows),  # cast here: the function would have the form by columns made alone
            of_x(x_rows),
            None,
            input_requires_grad=False,
            dtype=gradient.dtype,
            with_quantized_compute=True,
            input_quantizer=of_x,
            grad_output_quantizer=of_gradient,
        )
        return result  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor,
        weight_scale: Tensor,
        gradient_scale: Callable[[Tensor], Tensor],
        w8: Any,
        formats: Formats,
    ) -> Tensor:
        ctx.gradient_scale, ctx.formats, ctx.w8 = gradient_scale, formats, w8
        keeps = ctx.needs_input_grad[1]
        rows = x.flatten(0, -2).contiguous()
        result, x8, _ = _functions()._functional_forward(
            rows,
            weight if w8 is None else w8,
            dtype=x.dtype,
            with_quantized_compute=True,
            input_quantizer=_quantizer(x, x_scale, formats.forward),
            weight_quantizer=_quantizer(x, weight_scale, formats.forward),
            input_requires_grad=False,  # backward casts the weight again: none is kept for every micro-batch
            weight_requires_grad=keeps and formats.weight_gradient,
        )
        # Of the engine's tensor its plain ones are saved, which hooks can move to the host or compute again.
        saved = (x8 if formats.weight_gradient else rows) if keeps else None
        tensors, ctx.saved = importlib.import_module(_PACKAGE).prepare_for_saving(saved)
        ctx.save_for_backward(weight if w8 is None else None, x_scale, weight_scale, *tensors)
        return result.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x_scale, weight_scale, *tensors = ctx.saved_tensors
        (saved,) = importlib.import_module(_PACKAGE).restore_from_saved(ctx.saved, tensors)
        ctx.saved = None  # it would hold on to the memory as long as the graph lives
        formats, rows = ctx.formats, grad.flatten(0, -2).contiguous()
        in_eight_bits = saved is not None and formats.weight_gradient
        grad_x, grad_weight = _functions()._functional_backward(
            rows,
            saved if in_eight_bits else None,
            weight if ctx.w8 is None else ctx.w8,
            weight_requires_grad=in_eight_bits,
            dtype=grad.dtype,
            with_quantized_compute=True,
            input_quantizer=_quantizer(grad, x_scale, formats.forward),
            weight_quantizer=_quantizer(grad, weight_scale, formats.forward),
            grad_output_quantizer=_quantizer(grad, ctx.gradient_scale(grad), formats.gradient),
        )
        if saved is not None and not in_eight_bits:
            grad_weight = rows.t() @ saved
        return grad_x.view(*grad.shape[:-1], -1), grad_weight, *(None,) * 5


def _functions() -> Any:
    return importlib.import_module(_PACKAGE).ops.BasicLinear


def _quantizer(like: Tensor, scale: Tensor, to: Format) -> Any:
    """Casts tensors where `like` is; checked here, since a kernel reads a scale's memory whatever is in it."""
    if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != like.device:
        found = f"{scale.numel()} {scale.dtype} on {scale.device}"
        raise ValueError(f"a scale must be one float32 on {like.device}, not {found}")
    engine, names = importlib.import_module(_PACKAGE), importlib.import_module(f"{_PACKAGE}.constants")
    scale = scale.reshape(1)
    quantizer = engine.Float8Quantizer(scale, torch.empty_like(scale), names.TE_DType[to.dtype])
    quantizer.internal = True  # what it makes is for products alone
    return quantizer
