"""Stand-ins for GPU packages on a CPU: their published signatures, the maths of our reference behind them.

They show that the adapters pass the right argument to the right parameter in the right layout. What the real kernels
compute is for `python -m megatron.ops.check --device cuda` on a machine with a GPU.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import torch
import torch.nn.functional as F

from megatron.ops import reference


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: dict[str, Any]) -> torch.Tensor:
    """q, k, v [b, s, heads, d], as flash-attn lays them out."""
    assert rules.pop("causal"), "flash-attn is not causal unless told so"
    left, right = rules.pop("window_size")
    assert right in (-1, 0)
    slopes = rules.pop("alibi_slopes", None)
    assert slopes is None or slopes.dtype == torch.float32
    result = reference.attention(
        *(x.transpose(0, 1) for x in (q, k, v)),
        scale=rules.pop("softmax_scale"),
        window=None if left < 0 else left + 1,
        alibi_slopes=slopes,
        dropout_p=rules.pop("dropout_p", 0.0),
    )
    return result.transpose(0, 1)


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, rules: Any) -> torch.Tensor:
    """q, k, v [tokens, heads, d], documents one after the other."""
    assert starts.dtype == torch.int32
    bounds = starts.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == q.shape[0]
    pieces = [
        _dense(*(x[None, start:end] for x in (q, k, v)), dict(rules))[0] for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(pieces)


def flash_attn() -> types.ModuleType:
    """flash-attn 2.8."""
    module = types.ModuleType("flash_attn")

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        rules = {"causal": causal, "window_size": window_size, "alibi_slopes": alibi_slopes, "dropout_p": dropout_p}
        return _dense(q, k, v, {**rules, "softmax_scale": softmax_scale})

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        rules = {"causal": causal, "window_size": window_size, "alibi_slopes": alibi_slopes, "dropout_p": dropout_p}
        return _packed(q, k, v, cu_seqlens_q, {**rules, "softmax_scale": softmax_scale})

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def flash_attn_interface() -> types.ModuleType:
    """flash-attn 3."""
    module = types.ModuleType("flash_attn_interface")

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        return _dense(q, k, v, {"causal": causal, "window_size": window_size, "softmax_scale": softmax_scale})

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        rules = {"causal": causal, "window_size": window_size, "softmax_scale": softmax_scale}
        return _packed(q, k, v, cu_seqlens_q, rules)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def apex_fused_layer_norm() -> types.ModuleType:
    """apex.normalization.fused_layer_norm."""
    module = types.ModuleType("apex.normalization.fused_layer_norm")

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        assert input.dtype == weight.dtype
        return F.rms_norm(input, normalized_shape, weight, eps)

    def fused_layer_norm_affine(
        input,
        weight,
        bias,
        normalized_shape,
        eps=1e-6,
        memory_efficient=False,
    ):
        assert input.dtype == weight.dtype == bias.dtype
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    module.fused_rms_norm_affine, module.fused_layer_norm_affine = fused_rms_norm_affine, fused_layer_norm_affine
    return module


ENGINE_DTYPES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16", torch.float16: "kFloat16"}


def transformer_engine_constants() -> types.ModuleType:
    """transformer_engine.pytorch.constants of Transformer Engine 2."""
    module = types.ModuleType("transformer_engine.pytorch.constants")
    module.TE_DType = ENGINE_DTYPES
    return module


def _engine_arguments(*tensors: torch.Tensor) -> None:
    x, *others = tensors
    assert x.dim() == 2
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert {tensor.dtype for tensor in others} == {x.dtype}


def transformer_engine_torch() -> types.ModuleType:
    """The compiled functions of Transformer Engine 2, whose gradients take what the forward ones returned."""
    module = types.ModuleType("transformer_engine_torch")

    def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
        assert (ln_out, quantizer, otype, sm_margin) == (None, None, ENGINE_DTYPES[input.dtype], 0)
        assert zero_centered_gamma is False
        _engine_arguments(input, weight)
        rsigma = input.float().pow(2).mean(-1).add(eps).rsqrt()
        return (input.float() * rsigma[:, None] * weight.float()).to(input.dtype), None, rsigma

    def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
        assert (sm_margin, zero_centered_gamma, rsigma.shape) == (0, False, x.shape[:1])
        _engine_arguments(dz, x, gamma)
        normed, scaled = x.float() * rsigma[:, None], dz.float() * gamma.float()
        dx = rsigma[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return [dx.to(x.dtype), (dz.float() * normed).sum(0).to(gamma.dtype)]

    def layernorm_fwd(input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
        assert (ln_out, quantizer, otype, sm_margin) == (None, None, ENGINE_DTYPES[input.dtype], 0)
        assert zero_centered_gamma is False
        _engine_arguments(input, weight, bias)
        mu = input.float().mean(-1)
        rsigma = input.float().var(-1, correction=0).add(eps).rsqrt()
        normed = (input.float() - mu[:, None]) * rsigma[:, None]
        return (normed * weight.float() + bias.float()).to(input.dtype), mu, rsigma

    def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma):
        assert (sm_margin, zero_centered_gamma, mu.shape, rsigma.shape) == (0, False, x.shape[:1], x.shape[:1])
        _engine_arguments(dz, x, gamma)
        normed, scaled = (x.float() - mu[:, None]) * rsigma[:, None], dz.float() * gamma.float()
        centred = scaled - scaled.mean(-1, keepdim=True)
        dx = rsigma[:, None] * (centred - normed * (scaled * normed).mean(-1, keepdim=True))
        return [dx.to(x.dtype), (dz.float() * normed).sum(0).to(gamma.dtype), dz.float().sum(0).to(gamma.dtype)]

    module.__dict__.update(
        rmsnorm_fwd=rmsnorm_fwd, rmsnorm_bwd=rmsnorm_bwd, layernorm_fwd=layernorm_fwd, layernorm_bwd=layernorm_bwd
    )
    return module


def liger_rms_norm() -> types.ModuleType:
    """liger_kernel.ops.rms_norm."""
    module = types.ModuleType("liger_kernel.ops.rms_norm")

    class LigerRMSNormFunction:
        @staticmethod
        def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
            assert casting_mode == "gemma"
            assert not in_place
            return reference.rms_norm(X, W + offset, eps)

    module.LigerRMSNormFunction = LigerRMSNormFunction
    return module


def liger_swiglu() -> types.ModuleType:
    """liger_kernel.ops.swiglu."""
    module = types.ModuleType("liger_kernel.ops.swiglu")

    class LigerSiLUMulFunction:
        @staticmethod
        def apply(a, b):
            return reference.swiglu(a, b)

    module.LigerSiLUMulFunction = LigerSiLUMulFunction
    return module
