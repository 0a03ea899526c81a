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
        float32 [s, b], the same on all ranks.
    """
    start = group.rank * logits.shape[-1]
    real = min(max(vocab_size - start, 0), logits.shape[-1])
    if group.size == 1:
        return ops.cross_entropy(logits if real == logits.shape[-1] else logits[..., :real], labels)
    return _VocabParallelCrossEntropy.apply(logits, labels - start, real, group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they are and recomputes the softmax from them in backward, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, real: int, group: Group) -> Tensor:
        rows, own = logits.flatten(0, -2), labels.flatten()
        highest = collectives.all_reduce(_row_max(rows, real), group, collectives.MAX)
        sums = torch.empty(2, rows.shape[0], dtype=torch.float32, device=rows.device)
        for chunk in _chunks(rows):
            part = rows[chunk, :real].float()
            sums[0, chunk] = (part - highest[chunk, None]).exp_().sum(-1)
        sums[1] = _pick(rows, own, real)
        exponentials, of_label = collectives.all_reduce(sums, group)
        log_sum = exponentials.log() + highest
        ctx.real = real
        ctx.save_for_backward(logits, own, log_sum)
        return (log_sum - of_label).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, own, log_sum = ctx.saved_tensors
        rows, scale = logits.flatten(0, -2), grad.flatten().float()
        result = torch.zeros_like(rows)
        for chunk in _chunks(rows):
            part = (rows[chunk, : ctx.real].float() - log_sum[chunk, None]).exp_()
            held = _held(own[chunk], ctx.real)
            part[held, own[chunk][held]] -= 1.0
            result[chunk, : ctx.real] = part.mul_(scale[chunk, None])
        return result.view(logits.shape), None, None, None


def _row_max(rows: Tensor, real: int) -> Tensor:
    if real == 0:
        return torch.full((rows.shape[0],), -torch.inf, dtype=torch.float32, device=rows.device)
    return rows[:, :real].amax(-1).float()


def _held(own: Tensor, real: int) -> Tensor:
    """Which labels are among this rank's columns."""
    return (own >= 0) & (own < real)


def _pick(rows: Tensor, own: Tensor, real: int) -> Tensor:
    """Logit of each row's label, 0 where another rank holds it."""
    held = _held(own, real)
    return rows.gather(1, own.masked_fill(~held, 0)[:, None])[:, 0].float().masked_fill(~held, 0.0)


def _chunks(rows: Tensor) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]
