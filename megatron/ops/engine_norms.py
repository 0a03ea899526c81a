"""Norms of NVIDIA's Transformer Engine 2, through the functions beneath its modules.

The modules own their weights, and read them once more in backward: they cannot compute with weights that are arguments.
Signatures of `transformer_engine_torch`, as its Python bindings have them from 2.0 on:
rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma) -> out, None, rsigma;
rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma) -> dx, dgamma;
layernorm_fwd and layernorm_bwd have a bias after the weight, mu before rsigma, and dbeta after dgamma.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import reference
from megatron.ops.registry import TOLERANCE, implements

_FIRST_VERSION = (2, 0)
_EXCLUDED_PROCESSORS, _ZERO_CENTERED = 0, False
_TOLERANCE = {dtype: TOLERANCE[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def unavailable(first: tuple[int, int] = _FIRST_VERSION) -> str:
    """Why the package cannot be used here; empty if it can.

    Args:
        first: the first version, major and minor, that has what is needed.
    """
    if find_spec("transformer_engine") is None:
        return "python package transformer-engine is not installed"
    version = metadata.version("transformer-engine")
    if tuple(map(int, version.split(".")[:2])) < first:
        return f"it needs transformer-engine {first[0]}.{first[1]} or later, not {version}"
    return ""


def _engine() -> tuple[Any, Any]:
    """The functions, and its names of the dtypes; the package loads the library the functions are in."""
    from transformer_engine.pytorch.constants import TE_DType

    import transformer_engine_torch  # isort: skip

    return transformer_engine_torch, TE_DType


def _check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in _TOLERANCE:
        names = ", ".join(map(str, _TOLERANCE))
        raise ValueError(f"--op {op}=transformer_engine computes in {names}, not in {x.dtype}: use --op {op}=torch")


@implements(reference.rms_norm, name="transformer_engine", tolerance=_TOLERANCE, why_unavailable=unavailable)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Weight is read in x's dtype, arithmetic is float32 inside."""
    _check_dtype("rms_norm", x)
    rows: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight.to(x.dtype), eps)  # type: ignore[no-untyped-call]
    return rows.view(x.shape)


@implements(reference.layer_norm, name="transformer_engine", tolerance=_TOLERANCE, why_unavailable=unavailable)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Weight and bias, which there always is, are read in x's dtype; arithmetic is float32 inside."""
    _check_dtype("layer_norm", x)
    shift = torch.zeros_like(weight) if bias is None else bias
    parameters = (weight.to(x.dtype), shift.to(x.dtype))
    rows: Tensor = _LayerNorm.apply(x.reshape(-1, x.shape[-1]), *parameters, eps)  # type: ignore[no-untyped-call]
    return rows.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        engine, names = _engine()
        x, weight = x.contiguous(), weight.contiguous()
        result: Tensor
        result, _, rsigma = engine.rmsnorm_fwd(
            x, weight, eps, None, None, names[x.dtype], _EXCLUDED_PROCESSORS, _ZERO_CENTERED
        )
        ctx.save_for_backward(x, rsigma, weight)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        engine, _ = _engine()
        gradients = engine.rmsnorm_bwd(grad.contiguous(), *ctx.saved_tensors, _EXCLUDED_PROCESSORS, _ZERO_CENTERED)
        return (*gradients, None)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        engine, names = _engine()
        x, weight = x.contiguous(), weight.contiguous()
        result: Tensor
        result, mu, rsigma = engine.layernorm_fwd(
            x, weight, bias.contiguous(), eps, None, None, names[x.dtype], _EXCLUDED_PROCESSORS, _ZERO_CENTERED
        )
        ctx.save_for_backward(x, mu, rsigma, weight)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        engine, _ = _engine()
        gradients = engine.layernorm_bwd(grad.contiguous(), *ctx.saved_tensors, _EXCLUDED_PROCESSORS, _ZERO_CENTERED)
        return (*gradients, None)
