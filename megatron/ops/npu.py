"""What Huawei Ascend runs, in order of preference per operation. Figures and sources: docs/simulated-devices.md.

Contracts of the fused functions: the schemas and the documentation in torch_npu 2.13. Its shape inference accepts wrong
layouts, masks and dtypes, and the kernels then compute nonsense: each call stands behind checks of our own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import attention_blocks, cached_attention, linear_cross_entropy, portable, reference
from megatron.ops.registry import TOLERANCE, Implementation, implements

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK_LOGITS = 2**26
"""A quarter GiB of float32 logits at a time: large enough to fill the NPU, small beside the logits themselves."""
_COMPRESSED = 2048
"""Rows and columns of the triangle that stands for a causal mask of any size."""
_MOST_HEADS, _LARGEST_HEAD = 256, 768
_ROTARY_HEAD, _ROTARY_ROWS = 896, 1000
_SOFTMAX_STEP, _LONGEST_SOFTMAX = 32, 4096
_CAUSAL, _BAND, _WHOLE_MASK = 2, 4, 1  # values of sparse_mode
_SCALE_THEN_ADD = 0  # value of pse_type
_SUMMED_OVER = (2, 4, 8)  # ranks

_NPU_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({dtype: TOLERANCE[dtype] for dtype in _FLOATS})
_HALF_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {dtype: TOLERANCE[dtype] for dtype in (torch.bfloat16, torch.float16)}
)
_ATTENTION_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {dtype: portable.ATTENTION_TOLERANCE[dtype] for dtype in _FLOATS}
)


def _unavailable() -> str:
    return "" if find_spec("torch_npu") is not None else "python package torch_npu is not installed"


def _refuse(implementation: str, reason: str, instead: str) -> None:
    op = implementation.partition("=")[0]
    raise ValueError(f"--op {implementation} {reason}: use --op {op}={instead}")


def _check_dtype(implementation: str, x: Tensor, instead: str, allowed: Iterable[torch.dtype] = _FLOATS) -> None:
    if x.dtype not in allowed:
        _refuse(implementation, f"computes in {', '.join(map(str, allowed))}, not in {x.dtype}", instead)


@functools.cache
def compressed_causal_mask(device: torch.device) -> Tensor:
    """True above the diagonal, bool [2048, 2048]: what the fused attention takes for a causal mask of any length."""
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu(1)


@implements(reference.attention, name="fusion_attention", tolerance=_ATTENTION_TOLERANCE, why_unavailable=_unavailable)
def fusion_attention(
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
    """Ascend's fused attention. Causal masks and windows cost no memory; documents take a mask [b, 1, s, s]."""
    import torch_npu

    s, _, n, d = q.shape
    _check_dtype("attention=fusion_attention", q, "sdpa")
    if n > _MOST_HEADS or d > _LARGEST_HEAD:
        _refuse(
            "attention=fusion_attention",
            f"takes at most {_MOST_HEADS} heads of {_LARGEST_HEAD} channels, not {n} of {d}",
            "sdpa",
        )
    banded = window is not None and window < s
    if document_ids is not None:
        hidden = ~reference.visible_keys(s, q.device, document_ids=document_ids, window=window)
        mask = {"atten_mask": hidden, "sparse_mode": _WHOLE_MASK}
    else:
        mask = {"atten_mask": compressed_causal_mask(q.device), "sparse_mode": _BAND if banded else _CAUSAL}
    whole = 2**31 - 1
    before, after = (window - 1, 0) if banded and window is not None and document_ids is None else (whole, whole)
    arguments = (*(x.flatten(2) for x in (q, k, v)), n, "SBH")
    common = {**mask, "scale": scale, "keep_prob": 1.0 - dropout_p}
    if alibi_slopes is None:
        result = torch_npu.npu_fusion_attention(*arguments, **common, pre_tockens=before, next_tockens=after)
    else:
        bias = {"pse": _alibi(q, alibi_slopes), "pse_type": _SCALE_THEN_ADD}
        result = torch_npu.npu_fusion_attention_v2(*arguments, **common, **bias, pre_tokens=before, next_tokens=after)
    attended: Tensor = result[0]
    return attended.view(q.shape)


def _alibi(q: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi bias [1, n, s, s] in q's dtype: slopes times distances, which survive rounding better than positions."""
    positions = torch.arange(q.shape[0], device=q.device)
    return (slopes.float()[:, None, None] * (positions - positions[:, None])).to(q.dtype)[None]


@implements(reference.attention, name="masked_softmax", tolerance=_ATTENTION_TOLERANCE, why_unavailable=_unavailable)
def masked_softmax_attention(
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
    """Explicit scores in q's dtype and Ascend's fused scale, mask and softmax."""
    import torch_npu

    s, group = q.shape[0], q.shape[2] // k.shape[2]
    _check_dtype("attention=masked_softmax", q, "sdpa")
    if s > _LONGEST_SOFTMAX:
        _refuse(
            "attention=masked_softmax",
            f"takes sequences of at most {_LONGEST_SOFTMAX} tokens, not {s}",
            "fusion_attention",
        )
    # The kernel wants multiples of 32; causal queries do not see what is appended.
    missing = -s % _SOFTMAX_STEP
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) for x in (q, k, v))
    if document_ids is not None:
        document_ids = F.pad(document_ids, (0, missing))
    length = s + missing
    queries, keys, values = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = queries @ keys.transpose(-1, -2)
    if alibi_slopes is not None:
        scores, scale = scores * scale + _alibi(q, alibi_slopes), 1.0
    hidden = ~reference.visible_keys(length, q.device, document_ids=document_ids, window=window)
    weights: Tensor = torch_npu.npu_scaled_masked_softmax(scores, hidden.view(-1, 1, length, length), scale, False)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return (weights @ values)[:, :, :s].permute(2, 0, 1, 3)


@implements(reference.rms_norm, name="fused", tolerance=_NPU_TOLERANCE, why_unavailable=_unavailable)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Ascend's fused RMSNorm; weight is read in x's dtype, arithmetic is float32 inside."""
    import torch_npu

    _check_dtype("rms_norm=fused", x, "lean")
    result: Tensor = torch_npu.npu_rms_norm(x, weight.to(x.dtype), epsilon=eps)[0]
    return result


@implements(reference.rotary, name="fused", tolerance=_NPU_TOLERANCE, why_unavailable=_unavailable)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Ascend's fused rotation, with cosines and sines in x's dtype."""
    _, b, n, _ = x.shape
    channels = cos.shape[-1]
    _check_dtype("rotary=fused", x, "lean")
    if channels >= _ROTARY_HEAD or (b * n if interleaved else max(b, n)) >= _ROTARY_ROWS:
        _refuse(
            "rotary=fused",
            f"takes fewer than {_ROTARY_HEAD} channels and {_ROTARY_ROWS} sequences or heads, not {tuple(x.shape)}",
            "lean",
        )
    if interleaved and cos.shape[1] > 1:  # this form has one table for all sequences
        own = [slice(i, i + 1) for i in range(b)]
        return torch.cat([_rotate(x[:, i], cos[:, i], sin[:, i], interleaved) for i in own], dim=1)
    return _rotate(x, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    import torch_npu

    channels = cos.shape[-1]
    tables = (cos.to(x.dtype), sin.to(x.dtype))
    mode = "interleave" if interleaved else "half"
    rotated: Tensor = torch_npu.npu_rotary_mul(x[..., :channels], *tables, rotary_mode=mode)
    return rotated if channels == x.shape[-1] else torch.cat((rotated, x[..., channels:]), dim=-1)


@implements(reference.swiglu, name="fused", tolerance=_NPU_TOLERANCE, why_unavailable=_unavailable)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Ascend's fused SwiGLU, which wants gate and up joined; what is kept for backward is the joined copy."""
    import torch_npu

    _check_dtype("swiglu=fused", gate, "lean")
    result: Tensor = torch_npu.npu_swiglu(torch.cat((gate, up.to(gate.dtype)), dim=-1), dim=-1)
    return result


@implements(reference.matmul_all_reduce, name="fused", tolerance=_HALF_TOLERANCE, why_unavailable=_unavailable)
def matmul_all_reduce(x: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Ascend's product that sends what is finished while it computes the rest (MC2).

    The ranks must be NPUs of one machine that are all connected with each other, which cannot be checked here, and all
    calls in a model must be for the same ranks, as those of tensor-parallel layers are.
    """
    import torch_npu

    _check_dtype("matmul_all_reduce=fused", x, "torch", _HALF_TOLERANCE)
    if group is None:
        return F.linear(x, weight)
    ranks = group.size()
    if ranks not in _SUMMED_OVER:
        _refuse("matmul_all_reduce=fused", f"sums over {_SUMMED_OVER} tensor-parallel ranks, not {ranks}", "torch")
    backend: Any = group._get_backend(x.device)
    communicator = backend.get_hccl_comm_name(dist.get_rank())
    rows = x.flatten(0, -2).contiguous()  # the operator takes no transposed view of the input; of the weight it does
    result: Tensor = torch_npu.npu_mm_all_reduce_base(rows, weight.t(), communicator, reduce_op="sum")
    return result.view(*x.shape[:-1], -1)


@implements(reference.cross_entropy, name="chunked")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """No float32 copy of all logits, see `portable.chunked_cross_entropy`."""
    return portable.chunked_cross_entropy(logits, labels, _CHUNK_LOGITS)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    fusion_attention,
    masked_softmax_attention,
    portable.sdpa_attention,
    cached_attention.cached_attention,
    attention_blocks.attention_block,
    attention_blocks.attention_block_backward,
    portable.embedding_float32_sums,
    rms_norm,
    portable.rms_norm,
    portable.layer_norm,
    rotary,
    portable.rotary,
    swiglu,
    portable.swiglu,
    portable.geglu,
    portable.grouped_matmul,
    portable.matmul_all_reduce,
    matmul_all_reduce,
    portable.bias_gelu,
    cross_entropy,
    linear_cross_entropy.linear_cross_entropy,
    portable.clip_grad_norm,
    portable.adamw,
)
