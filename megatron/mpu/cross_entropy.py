"""Cross entropy of logits whose vocabulary is split over the tensor-parallel ranks.

Rows that only pad the vocabulary (see --make-vocab-size-divisible-by) take no part in the softmax: how far the
vocabulary is padded depends on the number of ranks, the loss must not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mpu import collectives
from megatron.mpu.groups import Group
from megatron.ops import Ops

# Elements whose float32 copies exist at a time: 64 MiB each, small beside the logits of a large vocabulary.
_CHUNK_ELEMENTS = 1 << 24


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, *, vocab_size: int, group: Group, ops: Ops) -> Tensor:
    """Per-token cross entropy in nats.

    Args:
        logits: [s, b, v/t] of any floating dtype, this rank's columns of the padded vocabulary (t ranks).
        labels: [s, b] int64, each below vocab_size, the same on all ranks.
        vocab_size: tokens that exist; the columns from there on are padding and ignored.
        group: the tensor-parallel ranks.
        ops: the kernels; a group of one uses its cross entropy.

    Returns:
        float32 [s, b] (float64 for float64 logits), the same on all ranks.
    """
    start, real = _own_columns(logits.shape[-1], vocab_size, group)
    if group.size == 1:
        return ops.cross_entropy(logits if real == logits.shape[-1] else logits[..., :real], labels)
    return _VocabParallelCrossEntropy.apply(logits, labels - start, real, group)


def vocab_parallel_linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, group: Group, ops: Ops
) -> Tensor:
    """Per-token cross entropy of the logits x weight^T in nats, by the operation `linear_cross_entropy`.

    Args:
        x: [s, b, h], the same on all ranks; each rank gets a part of its gradient.
        weight: [v/t, h] of x's dtype, this rank's rows of the padded vocabulary.
        labels, vocab_size, group: see `vocab_parallel_cross_entropy`.
        ops: the kernels, that operation among them.

    Returns:
        float32 [s, b] (float64 for float64 x), the same on all ranks.
    """
    assert ops.linear_cross_entropy is not None
    start, real = _own_columns(weight.shape[0], vocab_size, group)
    normalizers, of_label = ops.linear_cross_entropy(x, weight, labels - start, real)
    return normalizers - of_label if group.size == 1 else _JoinedLosses.apply(normalizers, of_label, group)


def _own_columns(columns: int, vocab_size: int, group: Group) -> tuple[int, int]:
    """The first column of this rank, and how many of its columns are tokens that exist."""
    start = group.rank * columns
    return start, min(max(vocab_size - start, 0), columns)


class _JoinedLosses(torch.autograd.Function):
    """Losses from what the ranks have: the logarithms of their sums of exponentials, and the logits of the labels."""

    @staticmethod
    def forward(ctx: Any, normalizers: Tensor, of_label: Tensor, group: Group) -> Tensor:
        highest = collectives.all_reduce(normalizers, group, collectives.MAX)
        sums = torch.stack(((normalizers - highest).exp(), of_label))
        exponentials, total_of_label = collectives.all_reduce(sums, group)
        joined = exponentials.log() + highest
        ctx.save_for_backward(normalizers, joined)
        return joined - total_of_label

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normalizers, joined = ctx.saved_tensors
        return grad * (normalizers - joined).exp(), -grad, None


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they are and recomputes the softmax from them in backward, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, real: int, group: Group) -> Tensor:
        rows, own = logits.flatten(0, -2), labels.flatten()
        highest = collectives.all_reduce(_row_max(rows, real), group, collectives.MAX)
        # Row 0: sum of the exponentials; row 1: logit of the label, 0 where another rank holds it.
        sums = highest.new_empty(2, rows.shape[0])
        for chunk in _chunks(rows):
            sums[0, chunk] = (_wide(rows[chunk, :real]) - highest[chunk, None]).exp_().sum(-1)
        columns, held = _columns(own, real)
        sums[1] = _wide(rows.gather(1, columns)[:, 0]) * held
        exponentials, of_label = collectives.all_reduce(sums, group)
        log_sum = exponentials.log() + highest
        ctx.real = real
        ctx.save_for_backward(logits, own, log_sum)
        return (log_sum - of_label).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, own, log_sum = ctx.saved_tensors
        rows, scale = logits.flatten(0, -2), grad.flatten().to(log_sum.dtype)
        columns, held = _columns(own, ctx.real)
        result = torch.zeros_like(rows)
        for chunk in _chunks(rows):
            if ctx.real:
                part = (_wide(rows[chunk, : ctx.real]) - log_sum[chunk, None]).exp_()
                part.scatter_add_(1, columns[chunk], -held[chunk, None].to(part.dtype))
                result[chunk, : ctx.real] = part.mul_(scale[chunk, None])
        return result.view(logits.shape), None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _row_max(rows: Tensor, real: int) -> Tensor:
    if real == 0:
        return torch.full_like(_wide(rows[:, 0]), -torch.inf)
    return _wide(rows[:, :real].amax(-1))


def _columns(own: Tensor, real: int) -> tuple[Tensor, Tensor]:
    """Column [rows, 1] of each label, 0 where another rank holds it; and whether this rank holds it, bool [rows]."""
    held = (own >= 0) & (own < real)
    return own.masked_fill(~held, 0)[:, None], held


def _chunks(rows: Tensor) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]
