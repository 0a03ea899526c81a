"""The definition of attention in pieces, of which the attention of a sequence that is spread over ranks is made.

What holds for all definitions is in `megatron.ops.reference`, which lists these among its own.
Shapes: s=queries, t=keys, b=micro-batch, n=query heads, g=kv heads, d=head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import checks
from megatron.ops.block_rules import BlockRules


def attention_block(q: Tensor, k: Tensor, v: Tensor, rules: BlockRules) -> tuple[Tensor, Tensor]:
    """Attention of a piece of each sequence to another piece, and the numbers by which such results are joined.

    Not differentiable: see `attention_block_backward`.

    Args:
        q: [s, b, n, d].
        k: [t, b, g, d], g divides n.
        v: [t, b, g, d].
        rules: who sees whom.

    Returns:
        The result [s, b, n, d] in q's dtype, and the normalizers, wide [b, n, s]: the logarithms of the sums of the
        exponentials of the scores. A query that sees no key has the result 0 and the normalizer minus infinity.
    """
    checks.attention_block(q, k, v, rules)
    scores = _scores(q, k, rules)
    normalizers = scores.logsumexp(dim=-1)
    result = weights_of(scores, normalizers) @ _per_query_head(v, q)
    return result.permute(2, 0, 1, 3).contiguous().to(q.dtype), normalizers


def attention_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, normalizers: Tensor, rules: BlockRules
) -> tuple[Tensor, Tensor, Tensor]:
    """What one piece adds to the gradients of a joined result (Dao et al. 2022, arXiv:2205.14135, appendix B.4).

    Args:
        grad: gradient of the joined result [s, b, n, d].
        q, k, v, rules: as in the forward pass.
        result: the joined result [s, b, n, d], over all keys that the queries see.
        normalizers: of the joined result, float32 or float64 [b, n, s], finite.

    Returns:
        Gradients of q, k and v, shaped like them, in q's dtype; all arithmetic is wide.
    """
    checks.attention_block_backward(grad, q, k, v, result, normalizers, rules)
    weights = weights_of(_scores(q, k, rules), normalizers)
    queries, grads, results = (_wide(x).permute(1, 2, 0, 3) for x in (q, grad, result))
    of_weights = grads @ _per_query_head(v, q).transpose(-1, -2)
    of_scores = weights * (of_weights - (grads * results).sum(dim=-1, keepdim=True)) * rules.scale
    grad_q = of_scores @ _per_query_head(k, q)
    sharing = (k.shape[2], q.shape[2] // k.shape[2])
    pairs = (of_scores.transpose(-1, -2) @ queries, weights.transpose(-1, -2) @ grads)
    grad_k, grad_v = (torch.unflatten(x, 1, sharing).sum(dim=2) for x in pairs)
    grad_q, grad_k, grad_v = (x.permute(2, 0, 1, 3).contiguous().to(q.dtype) for x in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v


def weights_of(scores: Tensor, normalizers: Tensor) -> Tensor:
    """exp(scores [..., s, t] - normalizers [..., s]), 0 where both are minus infinity."""
    return (scores - normalizers.clamp_min(torch.finfo(normalizers.dtype).min)[..., None]).exp()


def _scores(q: Tensor, k: Tensor, rules: BlockRules) -> Tensor:
    """Scores [b, n, s, t], minus infinity where a query does not see a key."""
    whole = (0, q.shape[0]), (0, k.shape[0])
    scores = _wide(q).permute(1, 2, 0, 3) @ _per_query_head(k, q).transpose(-1, -2) * rules.scale
    if rules.alibi_slopes is not None:
        scores = scores - rules.alibi_slopes.to(scores.dtype)[:, None, None] * rules.distances(*whole, q.device)
    return scores.masked_fill(rules.hidden(*whole, q.device)[:, None], float("-inf"))


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [t, b, g, d], wide and once for every query head: [b, n, t, d]."""
    return _wide(x).permute(1, 2, 0, 3).repeat_interleave(q.shape[2] // x.shape[2], dim=1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
