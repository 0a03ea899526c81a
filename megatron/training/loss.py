"""The loss of language modelling."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron.data.batch import Batch

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(output of the last stage, labels [s, b]) -> float32 losses [s, b] in nats."""


def losses_of_model(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The `TokenLoss` of a model that was given the labels and has computed the losses, see `ModelInputs.labels`."""
    return losses


def lm_loss(output: torch.Tensor, batch: Batch, token_loss: TokenLoss) -> torch.Tensor:
    """Sum of the cross entropies of the unmasked tokens of a micro-batch.

    The mean is taken once per step, over all micro-batches and data-parallel ranks: means of micro-batches with
    different numbers of unmasked tokens must not be averaged.

    Args:
        output: of the last stage: logits [s, b, v/tp] in the dtype of the model, or losses [s, b].
        batch: labels [b, s] and loss_mask [b, s].
        token_loss: what makes losses of it: the cross entropy of this rank's part of the vocabulary, or nothing.

    Returns:
        float32 scalar in nats.
    """
    losses = token_loss(output, batch.labels.transpose(0, 1))
    return (losses * batch.loss_mask.transpose(0, 1)).sum()
