"""Causal attention by blocks of query rows, made of batched matrix products: for devices whose fused kernel is slow.

A block of rows needs only the keys up to its last row, so the causal half of the scores is never computed; with a
window or with documents the keys before the first visible one are left out too. The heads that share a key/value
head become extra rows of one product, so keys and values are not repeated for grouped queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 128
"""Query positions per block: fastest of 64, 128 and 256 in float32 and bfloat16 at head dims 64 and 128."""

KEEP_WEIGHTS_UP_TO = 2048
"""Longest sequence whose attention weights are kept for the backward pass; beyond, they are computed again."""


def blocked_attention(
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
    """`megatron.ops.reference.attention` with scores and weights in q's dtype; softmax is float32 inside.

    Args:
        q: [s, b, n, d].
        k: [s, b, g, d].
        v: [s, b, g, d].
        scale: factor on q k^T.
        alibi_slopes: [n] or None.
        document_ids: [b, s] or None.
        window: visible positions or None.
        dropout_p: probability of dropping a weight.

    Returns:
        [s, b, n, d] in q's dtype, contiguous.
    """
    rules = _Rules(
        repeat=q.shape[2] // k.shape[2],
        scale=scale,
        alibi_slopes=alibi_slopes,
        document_ids=document_ids,
        window=window,
        dropout_p=dropout_p,
    )
    with torch.autocast(q.device.type, enabled=False):  # its casts would leave the two directions with different dtypes
        result: Tensor = _BlockedAttention.apply(q, k, v, rules)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Block:
    """Query positions [start, end) and the first key any of them sees; the last is end - 1."""

    start: int
    end: int
    first_key: int


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """Who sees whom, and how strongly. `repeat` = query heads per key/value head."""

    repeat: int
    scale: float
    alibi_slopes: Tensor | None
    document_ids: Tensor | None
    window: int | None
    dropout_p: float

    def blocks(self, length: int) -> Iterator[_Block]:
        for start in range(0, length, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, length)
            yield _Block(start, end, self._first_key(start, end))

    def _first_key(self, start: int, end: int) -> int:
        first = 0 if self.window is None else max(0, start - self.window + 1)
        if self.document_ids is not None:
            rows, keys = self.document_ids[:, start:end, None], self.document_ids[:, None, first:end]
            visible = (rows == keys).flatten(0, 1).any(dim=0)
            first += int(visible.int().argmax())
        return first

    def rows(self, block: _Block) -> slice:
        """Rows of the query matrix [b g, s repeat, d] that belong to a block."""
        return slice(block.start * self.repeat, block.end * self.repeat)

    def weights(self, queries: Tensor, keys: Tensor, block: _Block) -> Tensor:
        """Softmax of the block's scores: [b g, rows repeat, keys] in the queries' dtype."""
        columns = slice(block.first_key, block.end)
        scores = torch.baddbmm(  # beta=0 leaves its first argument unread; alpha scales without another pass
            queries.new_empty(()),
            queries[:, self.rows(block)],
            keys[:, columns].transpose(1, 2),
            beta=0,
            alpha=self.scale,
        )
        if self.alibi_slopes is not None:
            self._add_alibi(scores, self.alibi_slopes, block)
        self._hide(scores, block)
        return scores.softmax(dim=-1)

    def _distance(self, block: _Block, device: torch.device) -> Tensor:
        """Query position minus key position: [rows, keys]."""
        rows = torch.arange(block.start, block.end, device=device)
        return rows[:, None] - torch.arange(block.first_key, block.end, device=device)

    def _add_alibi(self, scores: Tensor, slopes: Tensor, block: _Block) -> None:
        # Softmax does not see a shift per row: distances instead of positions stay small where the weights are large.
        bias = slopes.float().view(-1, 1, self.repeat, 1) * -self._distance(block, scores.device)[:, None]
        heads, rows, _, keys = bias.shape
        scores.view(-1, heads, rows, self.repeat, keys).add_(bias)

    def _hide(self, scores: Tensor, block: _Block) -> None:
        """Scores of keys that a row must not see become minus infinity."""
        positions = block.end - block.start
        split = scores.view(scores.shape[0], positions, self.repeat, -1)
        if self.window is None and self.document_ids is None:  # only the last, square part hides anything
            split = split[..., block.start - block.first_key :]
            later = torch.ones(positions, positions, dtype=torch.bool, device=scores.device).triu(1)
            split.masked_fill_(later[:, None], float("-inf"))
            return
        distance = self._distance(block, scores.device)
        hidden = distance < 0
        if self.window is not None:
            hidden = hidden | (distance >= self.window)
        if self.document_ids is None:
            split.masked_fill_(hidden[:, None], float("-inf"))
            return
        rows = self.document_ids[:, block.start : block.end, None]
        hidden = hidden | (rows != self.document_ids[:, None, block.first_key : block.end])
        split.view(hidden.shape[0], -1, *split.shape[1:]).masked_fill_(hidden[:, None, :, None], float("-inf"))


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rules: _Rules) -> Tensor:
        queries, keys, values = to_rows(q, rules.repeat), to_rows(k, 1), to_rows(v, 1)
        result = torch.empty_like(queries)
        keep_weights = q.shape[0] <= KEEP_WEIGHTS_UP_TO
        kept_weights, kept_masks = [], []
        for block in rules.blocks(q.shape[0]):
            weights = rules.weights(queries, keys, block)
            if keep_weights:
                kept_weights.append(weights)
            if rules.dropout_p > 0.0:
                mask = torch.rand(weights.shape, device=weights.device) >= rules.dropout_p
                kept_masks.append(mask)
                weights = _drop(weights, mask, rules.dropout_p)
            result[:, rules.rows(block)] = torch.bmm(weights, values[:, block.first_key : block.end])
        ctx.save_for_backward(queries, keys, values, *kept_weights, *kept_masks)
        ctx.rules, ctx.length, ctx.keep_weights, ctx.shapes = rules, q.shape[0], keep_weights, (q.shape, k.shape)
        return from_rows(result, q.shape, rules.repeat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rules: _Rules = ctx.rules
        queries, keys, values, *kept = ctx.saved_tensors
        grad_rows = to_rows(grad, rules.repeat)
        grad_q = torch.empty_like(queries)
        # Every block adds to the keys and values it saw: in bfloat16 the sum would lose the small contributions.
        wide = torch.promote_types(keys.dtype, torch.float32)
        grad_k, grad_v = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        blocks = list(rules.blocks(ctx.length))
        kept_masks = kept[len(blocks) :] if ctx.keep_weights else kept
        for number, block in enumerate(blocks):
            rows, columns = rules.rows(block), slice(block.first_key, block.end)
            weights = kept[number] if ctx.keep_weights else rules.weights(queries, keys, block)
            grad_weights = torch.bmm(grad_rows[:, rows], values[:, columns].transpose(1, 2))
            dropped = weights
            if kept_masks:
                dropped = _drop(weights, kept_masks[number], rules.dropout_p)
                grad_weights = _drop(grad_weights, kept_masks[number], rules.dropout_p)
            grad_v[:, columns] += torch.bmm(dropped.transpose(1, 2), grad_rows[:, rows])
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[:, rows] = torch.bmm(grad_scores, keys[:, columns]).mul_(rules.scale)
            grad_k[:, columns] += torch.bmm(grad_scores.transpose(1, 2), queries[:, rows]).mul_(rules.scale)
        q_shape, k_shape = ctx.shapes
        return (
            from_rows(grad_q, q_shape, rules.repeat),
            from_rows(grad_k.to(keys.dtype), k_shape, 1),
            from_rows(grad_v.to(values.dtype), k_shape, 1),
            None,
        )


def _drop(weights: Tensor, mask: Tensor, p: float) -> Tensor:
    return weights * mask * (1.0 / (1.0 - p))


def to_rows(x: Tensor, repeat: int) -> Tensor:
    """[s, b, g repeat, d] -> [b g, s repeat, d], contiguous: one matrix per key/value head."""
    s, b, heads, d = x.shape
    return x.reshape(s, b * heads // repeat, repeat, d).transpose(0, 1).reshape(-1, s * repeat, d).contiguous()


def from_rows(x: Tensor, shape: torch.Size, repeat: int) -> Tensor:
    """The inverse of `_to_rows` for the full shape [s, b, heads, d], contiguous."""
    s, b, heads, d = shape
    return x.view(b * heads // repeat, s, repeat, d).transpose(0, 1).reshape(shape)
