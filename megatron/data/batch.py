"""What one micro-step reads: tokens, labels and masks of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from megatron.data.indexed_dataset import Tokens
from megatron.mpu.context import SequencePart

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one data-parallel rank."""

    tokens: torch.Tensor
    """[b, s] int64."""
    labels: torch.Tensor
    """[b, s] int64: the token after each token."""
    loss_mask: torch.Tensor
    """[b, s] float32: 1 where the label counts."""
    position_ids: torch.Tensor | None = None
    """[b or 1, s] int64 where positions restart after EOD; None means 0 to s - 1."""
    document_ids: torch.Tensor | None = None
    """[b, s] int64 where attention stays within documents; None means one document. Always of whole sequences."""
    dropout_seed: int = 0
    """Made from the seed of the run and the place of the first sample among all samples of the run."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader of torch where it is asked to pin."""
        return self._map(torch.Tensor.pin_memory)

    def cut(self, pieces: int) -> list[Batch]:
        """The batch as `pieces` batches [b, s / pieces] of consecutive parts of its samples; `pieces` divides s.

        Positions that restart after EOD stay those within the document.
        """
        if pieces == 1:
            return [self]
        length = self.tokens.shape[1] // pieces
        return [
            replace(
                self._map(lambda tensor, at=number * length: tensor[:, at : at + length].contiguous()),
                dropout_seed=mix_seed(self.dropout_seed, number),
            )
            for number in range(pieces)
        ]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            tokens=function(self.tokens),
            labels=function(self.labels),
            loss_mask=function(self.loss_mask),
            position_ids=None if self.position_ids is None else function(self.position_ids),
            document_ids=None if self.document_ids is None else function(self.document_ids),
        )


@dataclass(frozen=True, kw_only=True)
class MaskRules:
    """What an EOD token inside of a sample does."""

    eod: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    pad: int | None = None
    """Token that nothing is learned about: no loss where it is the label."""


def make_batch(samples: Tokens, real: npt.NDArray[np.bool_], rules: MaskRules, dropout_seed: int) -> Batch:
    """Cut samples into tokens and labels and derive the masks.

    Args:
        samples: [b, s + 1] int64.
        real: [b]; a sample that only fills the batch up has a loss mask of zeros.
        rules: what EOD does. The loss is masked where the *input* is EOD: its label starts another document.
        dropout_seed: passed on.
    """
    tokens = samples[:, :-1]
    ends = tokens == rules.eod
    loss_mask = np.repeat(real.astype(np.float32)[:, None], tokens.shape[1], axis=1)
    if rules.eod_mask_loss:
        loss_mask[ends] = 0.0
    if rules.pad is not None:
        loss_mask[samples[:, 1:] == rules.pad] = 0.0
    positions = positions_within_documents(ends) if rules.reset_position_ids else None
    documents = document_numbers(ends) if rules.reset_attention_mask else None
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
        labels=torch.from_numpy(np.ascontiguousarray(samples[:, 1:])),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=None if positions is None else torch.from_numpy(positions),
        document_ids=None if documents is None else torch.from_numpy(documents),
        dropout_seed=dropout_seed,
    )


def own_tokens(batch: Batch, part: SequencePart) -> Batch:
    """What one of the ranks that share the sequences of a micro-batch needs of it: its tokens, but all documents.

    Args:
        batch: of whole sequences [b, s].
        part: of the rank, one of n.

    Returns:
        Tokens, labels, loss mask and position ids [b, s/n] (or [1, s/n]); document ids [b, s].

    Raises:
        ValueError: if the sequences cannot be cut evenly.
    """
    if part.ranks == 1:
        return batch
    own = torch.tensor(part.tokens(batch.tokens.shape[1]))
    return replace(
        batch,
        tokens=batch.tokens[:, own],
        labels=batch.labels[:, own],
        loss_mask=batch.loss_mask[:, own],
        position_ids=own[None] if batch.position_ids is None else batch.position_ids[:, own],
    )


def document_numbers(ends: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """[b, s]: how many documents ended before each token, given where they end. EOD belongs to what it ends."""
    return np.cumsum(ends, axis=1, dtype=np.int64) - ends


def positions_within_documents(ends: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """[b, s]: the place of each token in its document, given where documents end."""
    places = np.broadcast_to(np.arange(ends.shape[1], dtype=np.int64), ends.shape)
    starts = np.zeros(ends.shape, np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], places[:, 1:], 0)
    return places - np.maximum.accumulate(starts, axis=1)


def mix_seed(seed: int, position: int) -> int:
    """A 63-bit number from two; near inputs give unrelated numbers (the finalizer of SplitMix64)."""
    value = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (value ^ (value >> 31)) >> 1
