"""The loss of language modelling."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron.data.batch import Batch

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [s, b, v/tp], labels [s, b]) -> float32 losses [s, b] in nats."""


def lm_loss(logits: torch.Tensor, batch: Batch, token_loss: TokenLoss) -> torch.Tensor:
    """Sum of the cross entropies of the unmasked tokens of a micro-batch.

    The mean is taken once per step, over all micro-batches and data-parallel ranks: means of micro-batches with
    different numbers of unmasked tokens must not be averaged.

    Args:
        logits: [s, b, v/tp], in the dtype of the model.
        batch: labels [b, s] and loss_mask [b, s].
        token_loss: cross entropy per token of logits over this rank's part of the vocabulary.

    Returns:
        float32 scalar in nats.
    """
    losses = token_loss(logits, batch.labels.transpose(0, 1))
    return (losses * batch.loss_mask.transpose(0, 1)).sum()
