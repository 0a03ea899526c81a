"""Attention of a few new tokens to all tokens before them: a form in plain torch that any device can list."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import reference
from megatron.ops.portable import ATTENTION_TOLERANCE
from megatron.ops.registry import implements


@implements(reference.cached_attention, name="grouped", tolerance=ATTENTION_TOLERANCE)
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """One product for all query heads of a key/value head: keys and values, which take the time, are read once."""
    (r, b, n, d), (s, _, g, _) = q.shape, k.shape
    # The heads that share a key/value head become rows of one product, so keys and values are not repeated.
    # Scaled before the product, which then does not overflow in float16.
    queries = (q * scale).permute(1, 2, 0, 3).reshape(b, g, n // g * r, d)
    scores = queries @ k.permute(1, 2, 3, 0)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).view(b, n, r, s)
    distance = positions[:, None, :, None] - torch.arange(s, device=q.device)  # [b, 1, r, s]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(q.dtype)
    mixed = weights.view(b, g, n // g * r, s) @ v.permute(1, 2, 0, 3)
    return mixed.view(b, n, r, d).permute(2, 0, 1, 3)
