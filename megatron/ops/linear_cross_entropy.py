"""The loss of the output layer without the logits of all tokens at any time, for any device.

Forward computes the logits of some columns of the vocabulary at a time and keeps one number per token; backward
computes them again, a product beside the three there are. Columns, not tokens, are taken in turn: so the gradient of a
row of the weight is one product over all tokens, and nothing as large as the weight is added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import reference
from megatron.ops.registry import implements

BLOCK_ELEMENTS = 2**24
"""Logits at a time, at most: 64 MiB in float32."""
VOCABULARY_PARTS = 16
"""At least: so that what is there at a time is small beside all logits of a small vocabulary, too."""
_COLUMN_STEP = 128
"""Matrix units take columns in multiples of this."""


@implements(reference.linear_cross_entropy, name="chunked")
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A part of the vocabulary at a time; its logits are computed again in the backward pass."""
    columns = min(BLOCK_ELEMENTS // labels.numel(), rows // VOCABULARY_PARTS)
    columns = max(1, columns // _COLUMN_STEP) * _COLUMN_STEP
    return in_blocks(x, weight, labels, rows, columns)


def in_blocks(x: Tensor, weight: Tensor, labels: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """`reference.linear_cross_entropy`, with so many columns of the logits at a time."""
    result: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(x, weight, labels, rows, columns)  # type: ignore[no-untyped-call]
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        tokens, targets = x.flatten(0, -2), labels.flatten()
        wide = torch.promote_types(x.dtype, torch.float32)
        normalizers = torch.full(targets.shape, -torch.inf, dtype=wide, device=x.device)
        of_label = torch.zeros_like(normalizers)
        for block in _blocks(rows, columns):
            normalizer, label = _parts(F.linear(tokens, weight[block]).to(wide), targets, block)
            normalizers = torch.logaddexp(normalizers, normalizer)
            of_label += label
        ctx.save_for_backward(x, weight, targets, normalizers)
        ctx.rows, ctx.columns = rows, columns
        return normalizers.view(labels.shape), of_label.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_of_label: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, targets, normalizers = ctx.saved_tensors
        tokens, grads = x.flatten(0, -2), (grad.flatten(), grad_of_label.flatten())
        wide = normalizers.dtype
        grad_tokens = torch.zeros_like(tokens, dtype=wide)
        grad_weight = torch.zeros_like(weight)
        for block in _blocks(ctx.rows, ctx.columns):
            wide_scores = _gradient(F.linear(tokens, weight[block]).to(wide), targets, block, normalizers, *grads)
            grad_scores = wide_scores.to(x.dtype)
            del wide_scores  # before the next block's
            grad_tokens += grad_scores @ weight[block]
            torch.mm(grad_scores.t(), tokens, out=grad_weight[block])
        return grad_tokens.to(x.dtype).view(x.shape), grad_weight, None, None, None


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    return (slice(start, min(start + columns, rows)) for start in range(0, rows, columns))


def _parts(scores: Tensor, targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Of the logits [tokens, columns] of a block: their logsumexp, and those of the labels in it, else 0."""
    column, held = _columns(targets, block)
    return scores.logsumexp(dim=-1), scores.gather(1, column)[:, 0] * held


def _gradient(
    scores: Tensor, targets: Tensor, block: slice, normalizers: Tensor, grad: Tensor, grad_of_label: Tensor
) -> Tensor:
    """The gradient of the logits of a block, in their place."""
    column, held = _columns(targets, block)
    scores.sub_(normalizers[:, None]).exp_().mul_(grad[:, None])
    return scores.scatter_add_(1, column, (grad_of_label * held)[:, None])


def _columns(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Column [tokens, 1] of each label in a block, 0 where it is in another; and whether it is in this one."""
    column = targets - block.start
    held = (targets >= block.start) & (targets < block.stop)
    return column.masked_fill(~held, 0)[:, None], held
