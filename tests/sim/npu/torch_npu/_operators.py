"""The simulated operators under the real schemas; see operators.json for where those come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tests.sim import snapshot
from tests.sim.vendor import Operators, below_autograd
from torch_npu import _maths
from torch_npu._check import attention_arguments, require

OPERATORS = Operators("npu", "npu", snapshot.read("npu")["schemas"])
_NOT_SIMULATED = ("padding_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen", "sink", "query_rope", "key_rope")


def _attention(o: dict[str, Any], scale: float) -> _maths.Attention:
    """The arguments of any version of the operator, in one form."""
    layout, n = o["input_layout"], o["head_num"]
    q, k, v, pse = o["query"], o["key"], o["value"], o["pse"]
    attention_arguments(q, k, v, n, layout, pse=pse, mask=o["atten_mask"], keep_prob=o["keep_prob"])
    for name in _NOT_SIMULATED:
        require(o.get(name) is None, f"the simulation has no {name}")
    d = q.shape[2] // n if "H" in layout else q.shape[3]
    queries, keys, values = (_maths.to_bnsd(x, layout, d) for x in (q, k, v))
    b, _, s, _ = queries.shape
    shape = (b, n, s, keys.shape[2])
    before, after = (o.get(f"{side}_tokens", o.get(f"{side}_tockens")) for side in ("pre", "next"))
    hidden = _maths.hidden_scores(o["atten_mask"], o["sparse_mode"], shape, before, after)
    bias: Tensor | float = 0.0
    if pse is not None:
        fits = [shape, (b, n, 1, shape[3]), (1, *shape[1:])]
        require(tuple(pse.shape) in fits, f"pse {tuple(pse.shape)} must be one of {fits}")
        order = o.get("pse_type", 1)
        require(order in (0, 1), f"pse_type {order} (the simulation has 0 and 1)")
        bias = pse.float() * (scale if order == 1 else 1.0)  # 1: added before the scores are scaled
    return _maths.Attention(queries, keys, values, hidden, bias, scale, o["keep_prob"])


def _attention_forward(o: dict[str, Any]) -> tuple[Any, ...]:
    attention = _attention(o, o["scale"])
    seed = int(torch.randint(2**31, ())) if o["keep_prob"] < 1 else 0
    result, normalizer = attention.forward(seed)
    query = o["query"]
    # The real operator returns the maximum and the sum, each in 8 equal columns.
    maximum = normalizer.expand(*normalizer.shape[:-1], 8).contiguous()
    output = _maths.from_bnsd(result.to(query.dtype), o["input_layout"])
    return output, maximum, torch.ones_like(maximum), query.new_empty(0), seed, 0, 0


def _attention_backward(o: dict[str, Any], outputs: int) -> tuple[Tensor, ...]:
    attention, query = _attention(o, o["scale_value"]), o["query"]
    grads = attention.backward(_maths.to_bnsd(o["dy"], o["input_layout"], attention.q.shape[3]), o["seed"])
    given = tuple(_maths.from_bnsd(grad.to(query.dtype), o["input_layout"]) for grad in grads)
    return (*given, *(query.new_empty(0) for _ in range(outputs - 3)))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        y, rstd = below_autograd(torch.ops.npu.npu_rms_norm, x, gamma, epsilon)
        ctx.save_for_backward(x, gamma, rstd)
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, rstd = ctx.saved_tensors
        return (*torch.ops.npu.npu_rms_norm_backward(dy, x, gamma, rstd), None)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, r1: Tensor, r2: Tensor, mode: str, rotate: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, r1, r2)
        ctx.mode = mode
        return below_autograd(torch.ops.npu.npu_rotary_mul, x, r1, r2, mode, rotate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch.ops.npu.npu_rotary_mul_backward(grad, *ctx.saved_tensors, ctx.mode), None, None)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return below_autograd(torch.ops.npu.npu_swiglu, x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.npu.npu_swiglu_backward(grad, *ctx.saved_tensors, ctx.dim), None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float, fixed: bool) -> Tensor:
        y = below_autograd(torch.ops.npu.npu_scaled_masked_softmax, x, mask, scale, fixed)
        ctx.save_for_backward(y, mask)
        ctx.settings = scale, fixed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            torch.ops.npu.npu_scaled_masked_softmax_backward(grad, *ctx.saved_tensors, *ctx.settings),
            None,
            None,
            None,
        )


class _FusionAttention(torch.autograd.Function):
    """For both versions; `o` holds all arguments."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any], version: str) -> tuple[Any, ...]:
        o = o | {"query": q, "key": k, "value": v}
        results = below_autograd(getattr(torch.ops.npu, f"npu_fusion_attention{version}"), **o)
        output, maximum, total, reserved, *numbers = results
        ctx.save_for_backward(q, k, v, maximum, total, reserved, output)
        ctx.mark_non_differentiable(maximum, total, reserved)
        ctx.options, ctx.version, ctx.numbers = o, version, numbers
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, maximum, total, reserved, output = ctx.saved_tensors
        o, operator = dict(ctx.options), getattr(torch.ops.npu, f"npu_fusion_attention_grad{ctx.version}")
        for name in ("query", "key", "value", "head_num", "input_layout", "seed", "offset", "dropout_mask"):
            o.pop(name)
        o["scale_value"] = o.pop("scale")
        o |= {"softmax_max": maximum, "softmax_sum": total, "softmax_in": reserved, "attention_in": output}
        o |= dict(zip(("seed", "offset", "numels"), ctx.numbers, strict=True))
        layout = (ctx.options["head_num"], ctx.options["input_layout"])
        return (*operator(q, k, v, dy, *layout, **o)[:3], None, None)


def _define_attention(version: str, grad_outputs: int) -> None:
    name, grad = f"npu_fusion_attention{version}", f"npu_fusion_attention_grad{version}"

    def forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return _attention_forward(OPERATORS.bind(name, args, kwargs))

    def backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return _attention_backward(OPERATORS.bind(grad, args, kwargs), grad_outputs)

    def apply(*args: Any, **kwargs: Any) -> Any:
        o = OPERATORS.bind(name, args, kwargs)
        return _FusionAttention.apply(o["query"], o["key"], o["value"], o, version)

    OPERATORS.define(name, forward, random=True)
    OPERATORS.define(grad, backward)
    OPERATORS.differentiable(name, apply)


def register() -> None:
    """Define all operators; once per process."""
    OPERATORS.define("npu_rms_norm", _maths.rms_norm)
    OPERATORS.define("npu_rms_norm_backward", _maths.rms_norm_backward)
    OPERATORS.differentiable("npu_rms_norm", lambda x, gamma, epsilon=1e-6: _RmsNorm.apply(x, gamma, epsilon))
    OPERATORS.define("npu_rotary_mul", _maths.rotary_mul)
    OPERATORS.define("npu_rotary_mul_backward", _maths.rotary_mul_backward)
    OPERATORS.differentiable(
        "npu_rotary_mul", lambda x, r1, r2, mode="half", rotate=None: _Rotary.apply(x, r1, r2, mode, rotate)
    )
    OPERATORS.define("npu_swiglu", _maths.swiglu)
    OPERATORS.define("npu_swiglu_backward", _maths.swiglu_backward)
    OPERATORS.differentiable("npu_swiglu", lambda x, dim=-1: _SwiGLU.apply(x, dim))
    OPERATORS.define("npu_scaled_masked_softmax", _maths.scaled_masked_softmax)
    OPERATORS.define("npu_scaled_masked_softmax_backward", _maths.scaled_masked_softmax_backward)
    OPERATORS.differentiable(
        "npu_scaled_masked_softmax", lambda x, mask, scale=1, fixed=False: _Softmax.apply(x, mask, scale, fixed)
    )
    _define_attention("", 5)
    _define_attention("_v2", 7)
