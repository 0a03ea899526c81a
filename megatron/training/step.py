"""One micro-batch through the model: from token ids to the sum of the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron.data.batch import Batch
from megatron.model.gpt import ModelInputs
from megatron.model.inputs import Auxiliary
from megatron.mpu.groups import ProcessGroups
from megatron.training.loss import TokenLoss, lm_loss


@dataclass(frozen=True)
class MicroStep:
    """Forward computation of a micro-batch."""

    model: Callable[..., torch.Tensor]
    token_loss: TokenLoss

    def __call__(self, batch: Batch, auxiliary: Auxiliary | None = None) -> torch.Tensor:
        """Sum of the losses of the unmasked tokens, a float32 scalar in nats.

        Args:
            batch: on the model's device.
            auxiliary: what becomes of the losses of routers.
        """
        output = self.model(batch.tokens, model_inputs(batch, auxiliary))
        return lm_loss(output, batch, self.token_loss)


def model_inputs(batch: Batch, auxiliary: Auxiliary | None = None) -> ModelInputs:
    """What the model reads of a batch besides its tokens, and what becomes of the losses of its routers."""
    return ModelInputs(
        position_ids=batch.position_ids,
        document_ids=batch.document_ids,
        dropout_seed=batch.dropout_seed,
        auxiliary=auxiliary,
        labels=batch.labels,
    )


def count_tokens(microbatches: Sequence[Batch], groups: ProcessGroups, device: torch.device) -> torch.Tensor:
    """Number of unmasked tokens of a global batch, at least 1: float32 scalar on `device`."""
    local = torch.stack([batch.loss_mask.sum() for batch in microbatches]).sum().to(device)
    return groups.sum_over_data(local).clamp(min=1.0)


@torch.no_grad()
def evaluate_microbatches(
    micro_step: MicroStep, microbatches: Sequence[Batch], groups: ProcessGroups, device: torch.device
) -> tuple[float, float]:
    """Sum of the losses (nats) and number of unmasked tokens, over the micro-batches of all ranks."""
    sums = torch.zeros(2, dtype=torch.float32, device=device)
    for batch in microbatches:
        on_device = batch.to(device)
        sums[0] += micro_step(on_device)
        sums[1] += on_device.loss_mask.sum()
    loss, tokens = groups.sum_over_data(sums).tolist()
    return loss, tokens
