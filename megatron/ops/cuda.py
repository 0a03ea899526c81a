"""What NVIDIA GPUs run, in order of preference per operation: torch's own kernels first, other packages when asked for.

The packages are imported when a kernel is called, never before. Their signatures, as published:
flash-attn 2 `flash_attn.flash_attn_func` and `flash_attn_varlen_func`; flash-attn 3 the same names in
`flash_attn_interface`; apex `apex.normalization.fused_layer_norm`; Liger `liger_kernel.ops`; Transformer Engine in
`engine_norms` and `engine_linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import (
    attention_blocks,
    cached_attention,
    engine_linear,
    engine_norms,
    flash_blocks,
    float8,
    grouped_mm,
    linear_cross_entropy,
    portable,
    reference,
    scaled_mm,
)
from megatron.ops.registry import Implementation, implements

_LARGEST_FLASH_HEAD = 256
_HOPPER = 9  # major compute capability
_EIGHT_BIT = (8, 9)  # compute capability of Ada
_GROUPED = (8, 0)  # compute capability of Ampere: the page of torch.nn.functional.grouped_mm
_CHUNK_LOGITS = 2**26
"""A quarter GiB of float32 logits at a time: large enough to fill the GPU, small beside the logits themselves."""

_HALF_SUMS = {torch.float32: 2e-2, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Products are accumulated with about 14 bits on Hopper (DeepSeek-V3, arXiv:2412.19437, 3.3.2), then rounded."""
_HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _needs(module: str, package: str) -> Callable[[], str]:
    """Availability test: the empty string if `module` can be imported, else what to install."""
    return lambda: "" if find_spec(module) is not None else f"python package {package} is not installed"


def document_starts(document_ids: Tensor) -> Tensor:
    """Where documents start in the concatenation of all sequences, and its end: int32 [documents + 1].

    Args:
        document_ids: [b, s]; a document is a run of equal ids within one sequence.
    """
    changes = torch.ones_like(document_ids, dtype=torch.bool)
    changes[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = changes.flatten().nonzero().squeeze(1)
    end = starts.new_tensor([document_ids.numel()])
    return torch.cat((starts, end)).to(torch.int32)


def _check_flash(name: str, q: Tensor) -> None:
    if q.dtype not in _HALF:
        raise ValueError(f"--op attention={name} computes in float16 or bfloat16, not {q.dtype}: use --bf16 or --fp16")
    if q.shape[-1] > _LARGEST_FLASH_HEAD:
        raise ValueError(f"--op attention={name}: head dim {q.shape[-1]} is above {_LARGEST_FLASH_HEAD}")


def _flash_window(window: int | None) -> tuple[int, int]:
    """Positions to the left and right of the query, itself not counted; -1 for no limit."""
    return (-1, -1) if window is None else (window - 1, 0)


@implements(reference.attention, name="flash_attn", tolerance=_HALF, why_unavailable=_needs("flash_attn", "flash-attn"))
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """flash-attn 2 (Dao 2023). Documents must be runs of equal ids; they are passed as sequences of their own."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    _check_flash("flash_attn", q)
    slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    queries, keys, values = (x.transpose(0, 1) for x in (q, k, v))
    if document_ids is None:
        result = flash_attn_func(
            queries,
            keys,
            values,
            dropout_p=dropout_p,
            softmax_scale=scale,
            causal=True,
            window_size=_flash_window(window),
            alibi_slopes=slopes,
        )
    else:
        starts = document_starts(document_ids)
        result = flash_attn_varlen_func(
            queries.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=q.shape[0],
            max_seqlen_k=q.shape[0],
            dropout_p=dropout_p,
            softmax_scale=scale,
            causal=True,
            window_size=_flash_window(window),
            alibi_slopes=slopes,
        )
    attended: Tensor = result
    return attended.view(q.shape[1], q.shape[0], *q.shape[2:]).transpose(0, 1)


def _hopper_unavailable() -> str:
    missing = _needs("flash_attn_interface", "flash-attn 3 (module flash_attn_interface)")()
    if missing or (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == _HOPPER):
        return missing
    return "flash-attn 3 runs on Hopper GPUs (compute capability 9) only"


@implements(reference.attention, name="flash_attn_3", tolerance=_HALF, why_unavailable=_hopper_unavailable)
def flash_attention_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """flash-attn 3 (Shah et al. 2024), which has neither ALiBi nor dropout. Documents as in `flash_attention`."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    _check_flash("flash_attn_3", q)
    if alibi_slopes is not None or dropout_p > 0.0:
        raise ValueError("--op attention=flash_attn_3 has no ALiBi and no dropout: use --op attention=flash_attn")
    queries, keys, values = (x.transpose(0, 1) for x in (q, k, v))
    if document_ids is None:
        result = flash_attn_func(
            queries, keys, values, softmax_scale=scale, causal=True, window_size=_flash_window(window)
        )
    else:
        starts = document_starts(document_ids)
        result = flash_attn_varlen_func(
            queries.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=q.shape[0],
            max_seqlen_k=q.shape[0],
            softmax_scale=scale,
            causal=True,
            window_size=_flash_window(window),
        )
    attended: Tensor = result[0] if isinstance(result, tuple) else result  # early versions return (out, lse)
    return attended.view(q.shape[1], q.shape[0], *q.shape[2:]).transpose(0, 1)


@implements(reference.rms_norm, name="torch")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Torch's fused kernel; weight is read in x's dtype, arithmetic is float32 inside."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


@implements(reference.layer_norm, name="torch")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Torch's fused kernel; weight and bias are read in x's dtype, arithmetic is float32 inside."""
    shift = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, list(x.shape[-1:]), weight.to(x.dtype), shift, eps)


@implements(reference.rms_norm, name="apex", why_unavailable=_needs("fused_layer_norm_cuda", "apex with CUDA kernels"))
def apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apex's fused kernel."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    result: Tensor = fused_rms_norm_affine(x, weight.to(x.dtype), x.shape[-1:], eps)
    return result


@implements(
    reference.layer_norm, name="apex", why_unavailable=_needs("fused_layer_norm_cuda", "apex with CUDA kernels")
)
def apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Apex's fused kernel, which always takes a bias."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    shift = torch.zeros_like(weight) if bias is None else bias
    result: Tensor = fused_layer_norm_affine(x, weight.to(x.dtype), shift.to(x.dtype), x.shape[-1:], eps)
    return result


@implements(reference.rms_norm, name="liger", why_unavailable=_needs("liger_kernel", "liger-kernel"))
def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Liger's Triton kernel; casting mode "gemma" is the one with all arithmetic in float32.

    Its in-place backward pass overwrites the incoming gradient, which other branches may still need: it is off.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    result: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
    return result


@implements(reference.swiglu, name="liger", why_unavailable=_needs("liger_kernel", "liger-kernel"))
def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Liger's Triton kernel."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    result: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return result


@implements(reference.cross_entropy, name="chunked")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """No float32 copy of all logits, see `portable.chunked_cross_entropy`."""
    return portable.chunked_cross_entropy(logits, labels, _CHUNK_LOGITS)


@implements(reference.cross_entropy, name="torch")
def torch_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Torch's kernels on float32 logits: quick, with a float32 copy of all logits."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def _eight_bit_unavailable() -> str:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= _EIGHT_BIT:
        return ""
    return "GPUs compute with 8-bit numbers from compute capability 8.9 on"


@implements(reference.make_linear, name="scaled_mm", tolerance=_HALF_SUMS, why_unavailable=_eight_bit_unavailable)
def make_linear(in_features: int, out_features: int, formats: float8.Formats) -> float8.Product:
    """The products of cuBLASLt, through torch; see `scaled_mm`."""
    return scaled_mm.make(in_features, out_features, formats)


def _engine_unavailable() -> str:
    return engine_linear.not_installed() or _eight_bit_unavailable() or engine_linear.broken()


@implements(
    reference.make_linear, name="transformer_engine", tolerance=_HALF_SUMS, why_unavailable=_engine_unavailable
)
def engine_make_linear(in_features: int, out_features: int, formats: float8.Formats) -> float8.Product:
    """The casts and products of Transformer Engine; see `engine_linear`."""
    return engine_linear.EngineProduct(in_features, out_features, formats)


def _grouped_unavailable() -> str:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= _GROUPED:
        return grouped_mm.why_unavailable()
    return "torch multiplies groups of rows on GPUs from compute capability 8.0 on"


grouped_matmul = implements(
    reference.grouped_matmul,
    name="grouped_mm",
    tolerance=grouped_mm.TOLERANCE,
    why_unavailable=_grouped_unavailable,
)(grouped_mm.grouped_matmul)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    portable.sdpa_attention,
    flash_attention,
    flash_attention_3,
    cached_attention.cached_attention,
    flash_blocks.attention_block,
    attention_blocks.attention_block,
    flash_blocks.attention_block_backward,
    attention_blocks.attention_block_backward,
    portable.embedding,
    rms_norm,
    portable.rms_norm,
    apex_rms_norm,
    liger_rms_norm,
    engine_norms.rms_norm,
    layer_norm,
    apex_layer_norm,
    engine_norms.layer_norm,
    portable.rotary,
    portable.swiglu,
    liger_swiglu,
    portable.geglu,
    portable.grouped_matmul,
    grouped_matmul,
    portable.matmul_all_reduce,
    portable.bias_gelu,
    cross_entropy,
    torch_cross_entropy,
    linear_cross_entropy.linear_cross_entropy,
    make_linear,
    engine_make_linear,
    portable.clip_grad_norm,
    portable.adamw,
)
