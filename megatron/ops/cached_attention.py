"""Attention of a few new tokens to all tokens before them, whose keys and values were kept.

Plain torch, the same on every device: with one query per text the time goes into reading the keys and values once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """`reference.attention` for the last tokens of each text alone.

    Slot j of the keys holds position j of its text. A query at position p sees slots j <= p, and with a window those
    with p - j < window. Query head i uses key/value head i // (n / g).

    Args:
        q: [r, b, n, d], r new tokens of each of b texts.
        k: [s, b, g, d], g divides n; slots that no query sees hold anything finite.
        v: [s, b, g, d].
        positions: [b, r] int64 of the queries in their texts, below s.
        scale: factor on q k^T.
        alibi_slopes: [n] or None.
        window: number of most recent positions a query sees, itself included; None for all.

    Returns:
        [r, b, n, d] in q's dtype; softmax is at least float32.
    """
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
