"""SIMULATION of transformer_engine.Linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from habana_frameworks.torch.hpex.experimental.transformer_engine import distributed, fp8
from habana_frameworks.torch.hpex.experimental.transformer_engine.recipe import LARGEST


@dataclass
class Meta:
    """Scales and the values they follow from, one column per tensor that is cast."""

    scale: Tensor
    scale_inv: Tensor
    amax_history: Tensor

    @classmethod
    def of(cls, columns: int, length: int) -> Meta:
        """Nothing measured yet: scales are 1."""
        ones = torch.ones(columns, device="hpu")
        return cls(ones, ones.clone(), torch.zeros(length, columns, device="hpu"))

    def resize(self, length: int) -> None:
        """Keep the most recent measurements, which are the first rows."""
        kept = self.amax_history[:length]
        self.amax_history = F.pad(kept, (0, 0, 0, length - kept.shape[0]))

    def measure(self, *tensors: Tensor, group: dist.ProcessGroup | None, reduce: bool) -> None:
        """Put the largest absolute values in front of the history, over all ranks of the group."""
        amax = torch.stack([tensor.detach().abs().amax().float() for tensor in tensors])
        if reduce and dist.is_initialized():
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        self.amax_history = torch.cat((amax[None], self.amax_history[:-1]))

    def update(self, largest: float, margin: int, algorithm: str) -> None:
        """Scales for the next casts: powers of two that bring the largest value just below the format's."""
        amax = self.amax_history.amax(0) if algorithm == "max" else self.amax_history[0]
        powers = torch.exp2(torch.floor(torch.log2(largest / amax)) - margin)
        self.scale = torch.where(amax > 0, powers, self.scale)
        self.scale_inv = self.scale.reciprocal()


def _cast(tensor: Tensor, meta: Meta, column: int, dtype: torch.dtype) -> Tensor:
    return torch.ops.hpu.cast_to_fp8_v2(tensor.contiguous(), meta.scale[column], False, False, dtype, None)[0]


class _Product(torch.autograd.Function):
    """x w^T + bias of 8-bit x and w; in backward of 8-bit gradients and, with HYBRID, of E5M2 forms of x and w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Linear, first: bool | None) -> Tensor:
        meta, (forward, backward) = layer.fp8_meta["scaling_fwd"], fp8.STATE.recipe.fp8_format.value
        rows = x.flatten(0, -2)
        weights = layer.cast_weight(weight, (forward, backward), first)
        ctx.save_for_backward(_cast(rows, meta, 0, backward), weights[1], meta.scale_inv)
        ctx.layer, ctx.recipe, ctx.shape, ctx.biased = layer, fp8.STATE.recipe, x.shape, bias is not None
        ctx.group, ctx.measured = fp8.STATE.group, layer.measured
        x8 = _cast(rows, meta, 0, forward)
        y = _gemm(x8, False, weights[0], True, x.dtype, meta.scale_inv[0], meta.scale_inv[1], bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale_inv = ctx.saved_tensors
        meta, recipe, rows = ctx.layer.fp8_meta["scaling_bwd"], ctx.recipe, grad.flatten(0, -2)
        meta.resize(recipe.amax_history_len)
        meta.update(LARGEST[torch.float8_e5m2], recipe.margin, recipe.amax_compute_algo)
        if ctx.measured:
            meta.measure(rows, group=ctx.group, reduce=recipe.reduce_amax)
        g = _cast(rows, meta, 0, torch.float8_e5m2)
        dx = _gemm(g, False, weight, False, grad.dtype, meta.scale_inv[0], scale_inv[1], None)
        dw = _gemm(g, True, x, False, grad.dtype, meta.scale_inv[0], scale_inv[0], None)
        return dx.view(ctx.shape), dw, rows.sum(0) if ctx.biased else None, None, None


def _gemm(
    a: Tensor,
    turn_a: bool,
    b: Tensor,
    turn_b: bool,
    dtype: torch.dtype,
    a_inv: Tensor,
    b_inv: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return torch.ops.hpu.fp8_gemm_v2(a, turn_a, b, turn_b, None, dtype, a_inv, b_inv, bias, False, None)


class Linear(nn.Module):
    """A linear layer; with `skip_weight_param_allocation` weight and bias come with every call."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        skip_weight_param_allocation: bool = False,
        params_dtype: torch.dtype = torch.float32,
        minimize_memory: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self._given = skip_weight_param_allocation
        if not skip_weight_param_allocation:
            self.weight = nn.Parameter(torch.randn(out_features, in_features, dtype=params_dtype, device="hpu"))
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device="hpu")) if bias else None
        self.fp8_meta: dict[str, Any] = {"scaling_fwd": Meta.of(2, 1), "scaling_bwd": Meta.of(1, 1)}
        self.runs, self.measured = 0, False
        self._cast: list[Tensor] | None = None

    def forward(
        self,
        inp: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        is_first_microbatch: bool | None = None,
    ) -> Tensor:
        """[..., in_features] -> [..., out_features] in the input's dtype."""
        if (weight is None) == self._given:
            raise ValueError("weight is passed exactly if the layer has none (skip_weight_param_allocation)")
        if weight is None:
            weight, bias = self.weight, self.bias
        if weight.shape != (self.out_features, self.in_features) or inp.shape[-1] != self.in_features:
            raise ValueError(f"input {tuple(inp.shape)} and weight {tuple(weight.shape)} do not fit")
        if not fp8.is_fp8_enabled():
            return F.linear(inp, weight, bias)
        self._prepare(inp, weight)
        return _Product.apply(inp, weight, bias, self, is_first_microbatch)

    def cast_weight(self, weight: Tensor, formats: tuple[torch.dtype, ...], first: bool | None) -> list[Tensor]:
        """The weight in the formats of the forward and the backward pass; made by the first micro-batch with it."""
        if first is False:
            if self._cast is None:
                raise ValueError("is_first_microbatch is False, but there was none with True")
            return self._cast
        cast = [_cast(weight, self.fp8_meta["scaling_fwd"], 1, dtype) for dtype in formats]
        if first:
            self._cast = cast
        return cast

    def _prepare(self, inp: Tensor, weight: Tensor) -> None:
        recipe, meta = fp8.STATE.recipe, self.fp8_meta["scaling_fwd"]
        self.fp8_meta["recipe"] = recipe
        again = distributed.is_fp8_activation_recompute_enabled() and torch.is_grad_enabled()
        self.measured = not again and fp8.measures(self.runs)
        if again:
            return
        self.runs += 1
        meta.resize(recipe.amax_history_len)
        meta.update(LARGEST[recipe.fp8_format.value[0]], recipe.margin, recipe.amax_compute_algo)
        if self.measured:
            meta.measure(inp, weight, group=fp8.STATE.group, reduce=recipe.reduce_amax)

    def get_extra_state(self) -> dict[str, Any]:
        """Scales and history, for checkpoints."""
        return {name: vars(self.fp8_meta[name]) for name in ("scaling_fwd", "scaling_bwd")}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what `get_extra_state` returned."""
        for name, values in state.items():
            self.fp8_meta[name] = Meta(**values)
