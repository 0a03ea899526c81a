"""Attention in pieces by blocks of query rows, made of batched matrix products: for every device.

Heads that share a key/value head become extra rows of one product. Shapes follow from lengths and positions alone:
nothing waits for a value on the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.ops import portable, reference
from megatron.ops.block_reference import weights_of
from megatron.ops.block_rules import BlockRules
from megatron.ops.blocked_attention import BLOCK_ROWS, from_rows, to_rows
from megatron.ops.registry import implements

Range = tuple[int, int]


@implements(reference.attention_block, name="blocked", tolerance=portable.ATTENTION_TOLERANCE)
def attention_block(q: Tensor, k: Tensor, v: Tensor, rules: BlockRules) -> tuple[Tensor, Tensor]:
    """Scores, then weights in q's dtype; everything between the two products is float32 (or float64)."""
    repeat = q.shape[2] // k.shape[2]
    queries, keys, values = to_rows(q, repeat), to_rows(k, 1), to_rows(v, 1)
    results, normalizers = [], []
    for rows, columns in _blocks(q, k, rules):
        scores = _scores(queries, keys, rows, columns, repeat, rules)
        highest = scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        raised = (scores - highest).exp()
        totals = raised.sum(dim=-1, keepdim=True)  # at least 1 where there is a key
        normalizers.append(totals.log() + highest)
        weights = (raised / totals.clamp_min(1.0)).to(q.dtype)
        results.append(torch.bmm(weights, values[:, slice(*columns)]))
    joined = torch.cat(normalizers, dim=1)
    by_head = from_rows(joined, torch.Size((*q.shape[:3], 1)), repeat)
    return from_rows(torch.cat(results, dim=1), q.shape, repeat), by_head[..., 0].permute(1, 2, 0).contiguous()


@implements(reference.attention_block_backward, name="blocked", tolerance=portable.ATTENTION_TOLERANCE)
def attention_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, normalizers: Tensor, rules: BlockRules
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights are computed again; gradients of keys and values are summed over the blocks in float32."""
    repeat = q.shape[2] // k.shape[2]
    queries, grads, keys, values = to_rows(q, repeat), to_rows(grad, repeat), to_rows(k, 1), to_rows(v, 1)
    along = to_rows((grad.to(normalizers.dtype) * result).sum(dim=-1, keepdim=True), repeat)
    totals = to_rows(normalizers.permute(2, 0, 1)[..., None], repeat)[..., 0]
    grad_q = []
    grad_k, grad_v = torch.zeros_like(keys, dtype=totals.dtype), torch.zeros_like(values, dtype=totals.dtype)
    for rows, columns in _blocks(q, k, rules):
        own, seen = slice(rows[0] * repeat, rows[1] * repeat), slice(*columns)
        weights = weights_of(_scores(queries, keys, rows, columns, repeat, rules), totals[:, own])
        of_weights = torch.bmm(grads[:, own], values[:, seen].transpose(1, 2))
        of_scores = (weights * (of_weights - along[:, own]) * rules.scale).to(q.dtype)
        grad_q.append(torch.bmm(of_scores, keys[:, seen]))
        grad_k[:, seen] += torch.bmm(of_scores.transpose(1, 2), queries[:, own])
        grad_v[:, seen] += torch.bmm(weights.to(q.dtype).transpose(1, 2), grads[:, own])
    return (
        from_rows(torch.cat(grad_q, dim=1), q.shape, repeat),
        from_rows(grad_k.to(q.dtype), k.shape, 1),
        from_rows(grad_v.to(q.dtype), k.shape, 1),
    )


def _blocks(q: Tensor, k: Tensor, rules: BlockRules) -> Iterator[tuple[Range, Range]]:
    """Ranges of queries, and of the keys in their reach."""
    for start in range(0, q.shape[0], BLOCK_ROWS):
        rows = (start, min(start + BLOCK_ROWS, q.shape[0]))
        yield rows, rules.keys_in_reach(*rows, k.shape[0])


def _scores(queries: Tensor, keys: Tensor, rows: Range, columns: Range, repeat: int, rules: BlockRules) -> Tensor:
    """Scores of some queries and some keys, minus infinity where a query does not see a key.

    Args:
        queries: [b g, s repeat, d].
        keys: [b g, t, d].
        rows, columns: which.
        repeat: query heads per key/value head.
        rules: who sees whom.

    Returns:
        [b g, rows repeat, columns] in at least float32.
    """
    own = queries[:, rows[0] * repeat : rows[1] * repeat]
    products = torch.bmm(own, keys[:, slice(*columns)].transpose(1, 2))
    scores = products.to(torch.promote_types(products.dtype, torch.float32)) * rules.scale
    split = torch.unflatten(scores, 1, (-1, repeat))  # [b g, rows, repeat, columns]
    if rules.alibi_slopes is not None:
        distances = rules.distances(rows, columns, scores.device)[:, None]
        slopes = rules.alibi_slopes.to(scores.dtype).view(-1, 1, repeat, 1)
        split = (torch.unflatten(split, 0, (-1, slopes.shape[0])) - slopes * distances).flatten(0, 1)
    hidden = rules.hidden(rows, columns, scores.device)
    by_sample = torch.unflatten(split, 0, (hidden.shape[0], -1))  # a mask for all samples, or one for each
    return by_sample.masked_fill(hidden[:, None, :, None], float("-inf")).flatten(0, 1).flatten(1, 2)
