"""The definition of every operation in plain torch: it runs everywhere and every kernel is measured against it.

Shapes: s=sequence, b=micro-batch, h=hidden, n=query heads, g=kv heads, d=head dim, f=ffn, v=vocabulary.
Results have the dtype of the first argument unless said otherwise. "Wide" arithmetic is float32 (float64 for float64
arguments, which makes these functions their own oracle). All raise ValueError for arguments that do not fit together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import block_reference, checks, float8
from megatron.ops.eight_bit_linear import EightBitProduct

CLIP_EPSILON = 1e-6
"""Added to the norm of gradients before dividing, as Megatron and torch.nn.utils.clip_grad_norm_ do."""


attention_block = block_reference.attention_block
attention_block_backward = block_reference.attention_block_backward


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    Args:
        x: [..., h].
        weight: [h].
        eps: added to the mean square.

    Returns:
        [..., h] in x's dtype; all arithmetic, the product with weight included, is wide.
    """
    checks.rms_norm(x, weight, eps)
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016).

    Args:
        x: [..., h].
        weight: [h].
        bias: [h] or None for no shift.
        eps: added to the (biased) variance.

    Returns:
        [..., h] in x's dtype; all arithmetic is wide.
    """
    checks.layer_norm(x, weight, bias, eps)
    wide = _wide(x)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    result = centred * torch.rsqrt(centred.pow(2).mean(dim=-1, keepdim=True) + eps) * weight
    return (result if bias is None else result + bias).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al. 2021): rotates pairs of channels by an angle that grows with the position.

    A pair (x0, x1) with angle t becomes (x0 cos t - x1 sin t, x1 cos t + x0 sin t). Pairs are channels (j, j + r/2),
    or (2j, 2j + 1) when interleaved. Channels from r on pass through.

    Args:
        x: [s, b, n, d].
        cos: [s, b or 1, 1, r] float32 or x's dtype; entry j belongs to channel j, so both channels of a pair hold the
            same number: [t0, t1, ..., t0, t1, ...], or [t0, t0, t1, t1, ...] when interleaved.
        sin: like cos.
        interleaved: which channels form a pair.

    Returns:
        [s, b, n, d] in x's dtype; arithmetic in the wider of x's and cos's dtype.
    """
    checks.rotary(x, cos, sin, interleaved)
    rotated_channels = cos.shape[-1]
    head, rest = x[..., :rotated_channels], x[..., rotated_channels:]
    if interleaved:
        turned = torch.stack((-head[..., 1::2], head[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = head.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return torch.cat(((head * cos + turned * sin).to(x.dtype), rest), dim=-1)


def attention(
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
    """Causal attention: softmax(scale q k^T + bias) v per head (Vaswani et al. 2017), with explicit scores.

    Query i sees key j if j <= i, and (with a window) i - j < window, and (with documents) both are in one document.
    Query head i uses key/value head i // (n / g) (Ainslie et al. 2023).

    Args:
        q: [s, b, n, d].
        k: [s, b, g, d], g divides n.
        v: [s, b, g, d].
        scale: factor on q k^T, usually d ** -0.5.
        alibi_slopes: [n] float; head i adds slope i times the key position to its scores (Press et al. 2022).
        document_ids: [b, s] integers; tokens of different documents do not see each other.
        window: number of most recent positions a query sees, itself included; None for all.
        dropout_p: probability with which an attention weight is dropped; draws from the device's default generator.

    Returns:
        [s, b, n, d] in q's dtype; all arithmetic is wide.
    """
    checks.attention(
        q,
        k,
        v,
        scale=scale,
        alibi_slopes=alibi_slopes,
        document_ids=document_ids,
        window=window,
        dropout_p=dropout_p,
    )
    queries, keys, values = _by_heads(q, k, v)
    scores = queries @ keys.transpose(-1, -2) * scale
    if alibi_slopes is not None:
        positions = torch.arange(q.shape[0], device=q.device, dtype=scores.dtype)
        scores = scores + alibi_slopes.to(scores.dtype)[:, None, None] * positions
    visible = visible_keys(q.shape[0], q.device, document_ids=document_ids, window=window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return (weights @ values).permute(2, 0, 1, 3).contiguous().to(q.dtype)


def _by_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [b, n, r, d], keys and values [b, n, s, d] of each query head, wide."""
    shared = q.shape[2] // k.shape[2]
    queries, keys, values = (_wide(x).permute(1, 2, 0, 3) for x in (q, k, v))
    return queries, keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)


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
    """`attention` for the last tokens of each text alone, to all tokens before them, whose keys and values were kept.

    Slot j of the keys holds position j of its text. A query at position p sees slots j <= p, and with a window those
    with p - j < window. It has no gradient: texts are written with it.

    Args:
        q: [r, b, n, d], r new tokens of each of b texts.
        k: [s, b, g, d], g divides n; slots that no query sees hold anything finite.
        v: [s, b, g, d].
        positions: [b, r] int64 of the queries in their texts, below s.
        scale: as for `attention`.
        alibi_slopes: as for `attention`.
        window: as for `attention`.

    Returns:
        [r, b, n, d] in q's dtype; all arithmetic is wide.
    """
    checks.cached_attention(q, k, v, positions, scale=scale, alibi_slopes=alibi_slopes, window=window)
    queries, keys, values = _by_heads(q, k, v)
    scores = queries @ keys.transpose(-1, -2) * scale
    slots = torch.arange(k.shape[0], device=q.device)
    distance = positions[:, None, :, None] - slots  # [b, 1, r, s]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(scores.dtype)[:, None, None] * slots
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return (weights @ values).permute(2, 0, 1, 3).contiguous().to(q.dtype)


def visible_keys(
    length: int, device: torch.device, *, document_ids: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Which keys a query sees under the rules of `attention`.

    Returns:
        bool [s, s], rows are queries; with document_ids [b, s]: [b, 1, s, s].
    """
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if document_ids is not None:
        visible = visible & (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
    return visible


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). Arguments and result [..., f]; arithmetic wide, result in gate's dtype."""
    checks.swiglu(gate, up)
    return (F.silu(_wide(gate)) * up).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with the exact gelu (Shazeer 2020). [..., f]; arithmetic wide, result in gate's dtype."""
    checks.geglu(gate, up)
    return (F.gelu(_wide(gate)) * up).to(gate.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: Literal["none", "tanh"]) -> Tensor:
    """gelu(x + bias) (Hendrycks and Gimpel 2016).

    Args:
        x: [..., f].
        bias: [f] or None.
        approximate: "none" for the exact x Phi(x), "tanh" for its approximation.

    Returns:
        [..., f] in x's dtype; arithmetic is wide.
    """
    checks.bias_gelu(x, bias, approximate)
    shifted = _wide(x) if bias is None else _wide(x) + bias
    return F.gelu(shifted, approximate=approximate).to(x.dtype)


def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table. The gradient of a row is the sum over its occurrences, made in at least float32.

    Args:
        weight: [v, h] floating.
        ids: [...] int64, each below v.

    Returns:
        [..., h] in the dtype of weight.
    """
    checks.embedding(weight, ids)
    if weight.dtype.itemsize < torch.float32.itemsize:
        return F.embedding(ids, weight.float()).to(weight.dtype)
    return F.embedding(ids, weight)


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Products of groups of rows with a matrix for each group: the linear layers of experts (Gale et al. 2022).

    Args:
        x: [m, i], the rows of the first group, then those of the second, ...
        weight: [E, o, i], of x's dtype.
        counts: rows of each group, int64 [E]; together m, any of them may be 0.

    Returns:
        [m, o] in x's dtype: rows of group e times the transpose of weight[e]; sums are wide.
    """
    checks.grouped_matmul(x, weight, counts)
    groups = zip(torch.split(_wide(x), counts.tolist()), _wide(weight).unbind(), strict=True)
    return torch.cat([rows @ matrix.t() for rows, matrix in groups]).to(x.dtype)


def matmul_all_reduce(x: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A linear map whose input features are split over ranks: the sum of the ranks' products (Shoeybi et al. 2019).

    It has no gradient of its own: that of the sum passes to every rank unchanged, see `mpu.layers`.

    Args:
        x: [..., i], this rank's part of the input features.
        weight: [o, i] of x's dtype, the columns that belong to them.
        group: the ranks, all of which call this; None = this one alone.

    Returns:
        The sum over the ranks of x weight^T: [..., o] in x's dtype; sums are wide, that over the ranks too.
    """
    checks.matmul_all_reduce(x, weight, group)
    product = F.linear(_wide(x), _wide(weight))
    if group is not None:
        dist.all_reduce(product, group=group)
    return product.to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021). Argument and result [...]."""
    checks.squared_relu(x)
    return F.relu(x).square()


def relu(x: Tensor) -> Tensor:
    """max(x, 0). Argument and result [...]."""
    checks.relu(x)
    return F.relu(x)


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, training: bool) -> Tensor:
    """Residual + dropout(x + bias): the end of every residual branch.

    Args:
        x: [..., h].
        bias: [h] or None.
        residual: [..., h]; may be wider than x.
        p: probability with which an element is dropped; draws from the device's default generator.
        training: without it nothing is dropped.

    Returns:
        [..., h] in residual's dtype.
    """
    checks.bias_dropout_add(x, bias, residual, p, training)
    shifted = x if bias is None else x + bias
    if training and p > 0.0:
        shifted = F.dropout(shifted, p)
    return (residual + shifted).to(residual.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-token loss: log(sum(exp(logits))) - logits[label], over the whole vocabulary.

    Args:
        logits: [..., v], any floating dtype.
        labels: [...] int64, each in [0, v).

    Returns:
        [...] float32 (float64 for float64 logits).
    """
    checks.cross_entropy(logits, labels)
    wide = _wide(logits)
    return wide.logsumexp(dim=-1) - wide.gather(-1, labels[..., None]).squeeze(-1)


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The two parts of the cross entropy of logits x weight^T: log(sum(exp(logits))), and logits[label].

    The loss is the first minus the second. They are apart because of ranks that hold parts of the vocabulary, which
    bring them together: see `mpu.cross_entropy`.

    Args:
        x: [..., h].
        weight: [v, h] of x's dtype.
        labels: [...] int64; outside of [0, rows), where another rank holds the label, the second part is 0.
        rows: how many rows of the weight take part, 0 to v; those behind them pad it.

    Returns:
        Both [...] float32 (float64 for float64 x); the first is -inf for no rows. Logits are wide, too.
    """
    checks.linear_cross_entropy(x, weight, labels, rows)
    logits = F.linear(_wide(x), _wide(weight[:rows]))
    padded = F.pad(logits, (0, 1))  # a column for the labels of other ranks
    column = labels.where((labels >= 0) & (labels < rows), rows)
    return logits.logsumexp(dim=-1), padded.gather(-1, column[..., None]).squeeze(-1)


def adamw(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """An AdamW optimizer (Loshchilov and Hutter 2019) that updates one parameter at a time.

    Args:
        groups: `{"params": [...], ...}` as torch.optim takes them; a group's own settings win over those below.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, times lr.

    Returns:
        A torch.optim.Optimizer with state `exp_avg`, `exp_avg_sq` and `step` per parameter.
    """
    checks.adamw(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False, fused=False)


def make_linear(in_features: int, out_features: int, formats: float8.Formats) -> float8.Product:
    """A linear map whose matrix products are of 8-bit numbers, see `megatron.ops.float8`; it has no parameters.

    Args:
        in_features: i, a multiple of 16.
        out_features: o, a multiple of 16.
        formats: of the numbers.

    Returns:
        A function, see `float8.Product`. With q(.) for a number cast to 8 bits and divided by its scale again, and g
        for the gradient of the result: result = q(x) q(weight)^T, gradient of x = q(g) q(weight), of
        weight = q(g)^T q(x), or g^T x without `formats.weight_gradient`. Sums are wide.
    """
    checks.make_linear(in_features, out_features, formats)
    return EightBitProduct(in_features, out_features, formats, float8.multiply)


def clip_grad_norm(
    gradients: Mapping[int, Sequence[Tensor]],
    device: torch.device,
    *,
    limit: float,
    scale: float = 1.0,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Bring the L2 norm of gradients that are spread over ranks down to a limit (Pascanu et al. 2013), in place.

    Args:
        gradients: this rank's parts, of any shapes, by the number of ranks that hold the same elements; there may be
            none.
        device: of the gradients and the result.
        limit: largest norm; 0 = none.
        scale: what the gradients were multiplied by (the loss scale); it is divided out.
        sum_over_ranks: sums a float32 scalar over all ranks; None: this rank has everything.

    Returns:
        The norm before clipping, over all ranks and without the scale: float32 scalar (float64 for float64
        gradients). If it is not finite the gradients are of no use any more.
    """
    checks.clip_grad_norm(gradients, device, limit=limit, scale=scale, sum_over_ranks=sum_over_ranks)
    parts = [_wide(part).square().sum() / copies for copies, group in gradients.items() for part in group]
    square = torch.stack(parts).sum() if parts else torch.zeros((), device=device)
    norm = (square if sum_over_ranks is None else sum_over_ranks(square)).sqrt() / scale
    factor = clip_factor(norm, limit) / scale
    for group in gradients.values():
        for part in group:
            part.mul_(factor.to(part.dtype))
    return norm


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of this norm (a scalar) are multiplied by so that it is at most `limit`; 0 means no limit."""
    return (limit / (norm + CLIP_EPSILON)).clamp(max=1.0) if limit > 0.0 else torch.ones_like(norm)
