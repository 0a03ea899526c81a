"""SIMULATION of the rotary helpers."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from habana_frameworks.torch import _check


class RotaryPosEmbeddingMode(Enum):
    """Which channels form a pair: those of the two halves, or neighbours."""

    BLOCKWISE = 0
    PAIRWISE = 1


def _matched(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in float32 if any is, else in x's dtype."""
    dtype = torch.float32 if torch.float32 in (x.dtype, cos.dtype, sin.dtype) else x.dtype
    return x.to(dtype), cos.to(dtype), sin.to(dtype)


def apply_rotary_pos_emb(
    p: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    offset: int = 0,
    mode: RotaryPosEmbeddingMode = RotaryPosEmbeddingMode.BLOCKWISE,
) -> Tensor:
    """The rotation, without gradients."""
    p, cos, sin = _matched(p, cos, sin)
    _check.rotary(p, cos, sin, position_ids, offset)
    return torch.ops.hpu.rotary_pos_embedding(p, sin, cos, position_ids, offset, mode.value)


def _backward(grad: Tensor, cos: Tensor, sin: Tensor, mode: RotaryPosEmbeddingMode) -> Tensor:
    grad, cos, sin = _matched(grad, cos, sin)
    return torch.ops.hpu.rotary_pos_embedding_backward(grad, sin, cos, None, 0, mode.value)


class RotaryPosEmbeddingHelperV1(torch.autograd.Function):
    """`apply(p, cos, sin, offset)`, the form of GPT-NeoX and LLaMA; cos and sin [s, 1, 1, d]."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, cos: Tensor, sin: Tensor, offset: int) -> Tensor:
        _check.require(cos.dim() == 4 and cos.shape[1] == 1, f"cos must be [s, 1, 1, d], not {tuple(cos.shape)}")
        ctx.save_for_backward(cos, sin)
        return apply_rotary_pos_emb(p, cos, sin, None, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(grad, *ctx.saved_tensors, RotaryPosEmbeddingMode.BLOCKWISE), None, None, None


class RotaryPosEmbeddingHelperV3(torch.autograd.Function):
    """`apply(p, rope_cache)`, the form of ChatGLM: neighbours form pairs, rope_cache [s, b or 1, r/2, 2]."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, rope_cache: Tensor) -> Tensor:
        ctx.save_for_backward(rope_cache)
        return _pairwise(p, rope_cache, lambda x, cos, sin: apply_rotary_pos_emb(x, cos, sin, None, 0, _PAIRWISE))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _pairwise(grad, *ctx.saved_tensors, lambda x, cos, sin: _backward(x, cos, sin, _PAIRWISE)), None


_PAIRWISE = RotaryPosEmbeddingMode.PAIRWISE


def _pairwise(x: Tensor, rope_cache: Tensor, rotate: Any) -> Tensor:
    rotated = rope_cache.shape[-2] * 2
    head, rest = x[..., :rotated], x[..., rotated:]
    cache = rope_cache[: x.shape[0]].reshape(x.shape[0], -1, 1, rotated // 2, 2)
    cos, sin = (cache[..., part].repeat_interleave(2, dim=-1).to(x.dtype) for part in (0, 1))
    return torch.cat((rotate(head, cos, sin), rest), dim=-1) if rest.shape[-1] else rotate(head, cos, sin)
