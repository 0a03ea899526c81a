"""From token ids to hidden states.

Legend: s=sequence, b=micro-batch, h=hidden, t=tensor-parallel ranks. With sequence parallelism the result is
[s/t, b, h], otherwise [s, b, h].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.model.inputs import ModelInputs
from megatron.model.norm import Norm
from megatron.model.setting import Setting
from megatron.mpu.collectives import own_part
from megatron.mpu.layers import VocabParallelEmbedding, replicated
from megatron.mpu.random import dropout_seed, seed_device

_NO_LAYER = -1


class PositionEmbedding(nn.Module):
    """Learned absolute positions; every tensor-parallel rank holds the whole table.

    Args:
        setting: of the model.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        arch = setting.arch
        self._group, self._split = setting.groups.tp, setting.sequence_parallel
        self.weight = nn.Parameter(
            torch.empty(arch.max_positions, arch.hidden_size, dtype=setting.dtype, device=setting.device)
        )

    def forward(self, length: int, position_ids: Tensor | None) -> Tensor:
        """Embeddings [s, 1 or b, h] (or their part of the sequence, [s/t, ...]).

        Args:
            length: s.
            position_ids: [b, s] int64, or None for 0 .. s-1.

        Raises:
            ValueError: if the sequence is longer than the table.
        """
        weight = replicated(self.weight, self._group, partial_grad=self._split)
        if length > weight.shape[0]:
            raise ValueError(
                f"a sequence of {length} tokens needs as many learned positions, there are {weight.shape[0]}; "
                f"raise --max-position-embeddings or lower --seq-length"
            )
        if position_ids is None:
            rows = weight[:length].unsqueeze(1)
            return own_part(rows, self._group) if self._split else rows
        ids = position_ids.transpose(0, 1)
        return F.embedding(own_part(ids, self._group) if self._split else ids, weight)


class Embedding(nn.Module):
    """Word embedding, learned positions, LayerNorm (BLOOM) and dropout, as far as the architecture has them.

    Args:
        setting: of the model.
        word_only: hold the word embedding alone: a last pipeline stage that uses it as the head.
    """

    def __init__(self, setting: Setting, *, word_only: bool = False) -> None:
        super().__init__()
        arch = setting.arch
        self._setting = setting
        self.word = VocabParallelEmbedding(
            arch.padded_vocab_size, arch.hidden_size, ops=setting.ops, **setting.linear()
        )
        learned = arch.position == "learned" and not word_only
        self.position = PositionEmbedding(setting) if learned else None
        self.norm = None
        if arch.embedding_norm and not word_only:
            self.norm = Norm(arch.hidden_size, setting, partial_grad=setting.sequence_parallel)

    def forward(self, tokens: Tensor, inputs: ModelInputs) -> Tensor:
        """Token ids [b, s] int64 -> [s, b, h] (or [s/t, b, h]), float32 with fp32_residual."""
        setting = self._setting
        hidden = self.word(tokens)
        if self.position is not None:
            hidden = hidden + self.position(tokens.shape[1], inputs.position_ids)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if setting.arch.fp32_residual:
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if setting.arch.hidden_dropout > 0.0 and self.training:
            split = setting.sequence_parallel
            seed = dropout_seed(inputs.dropout_seed, _NO_LAYER, "embedding", setting.groups, split=split)
            seed_device(hidden.device, seed)
            hidden = F.dropout(hidden, setting.arch.hidden_dropout)
        return hidden
