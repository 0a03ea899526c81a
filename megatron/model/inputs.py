"""What a forward pass needs besides token ids or hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron.model.cache import KeyValueCache


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """What becomes of the losses of routers, see `model.router`.

    Attributes:
        weight: what they are multiplied by for the gradients of this micro-batch: float32 scalar, or a number.
        totals: float32 [4] on the model's device, to which the backward pass of every layer with experts adds balance
            loss, z loss (without factors), dropped choices and all choices.
    """

    weight: Tensor | float
    totals: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Side inputs of one micro-batch, the same for every layer and pipeline stage.

    Attributes:
        position_ids: [b or 1, s] int64 of this rank's tokens; None = 0 .. s-1 in every sample.
        document_ids: [b, s] int64; tokens attend only within their own document; None = one document per sample.
            Context-parallel ranks need those of the whole sequence, not only of their tokens.
        dropout_seed: seed of this micro-batch's dropout masks; unused without dropout.
        auxiliary: what becomes of the losses of routers; None = they are left out, as in evaluation.
        cache: of text that is written token by token: keys and values are kept there. With position ids the tokens
            continue the texts in it, without they begin them.
        labels: [b, s] int64; where the table has a `linear_cross_entropy`, the last stage gives their losses. None =
            logits are wanted.
    """

    position_ids: Tensor | None = None
    document_ids: Tensor | None = None
    dropout_seed: int = 0
    auxiliary: Auxiliary | None = None
    cache: KeyValueCache | None = None
    labels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """Side inputs of a layer, made once per forward pass from `ModelInputs`.

    Attributes:
        cos, sin: [s, 1 or b, 1, r] float32 rotary tables (r = rotated channels); None without rotary positions.
        alibi_slopes: [n/t] float32, of this rank's query heads; None without ALiBi.
        document_ids: see `ModelInputs`.
        dropout_seed: see `ModelInputs`.
        auxiliary: see `ModelInputs`.
        cache: see `ModelInputs`.
        positions: [b, s] int64 of tokens that continue the texts in the cache; else None.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    alibi_slopes: Tensor | None = None
    document_ids: Tensor | None = None
    dropout_seed: int = 0
    auxiliary: Auxiliary | None = None
    cache: KeyValueCache | None = None
    positions: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that all layers share."""
        return self.cos, self.sin, self.alibi_slopes, self.document_ids
