"""Reading tokens with a model that is spread over tensor-parallel ranks and pipeline stages.

Legend: s=tokens read at once, b=texts, h=hidden, v=vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.config.architecture import Architecture
from megatron.model.gpt import GPT, ModelInputs
from megatron.mpu.collectives import broadcast, start_receive, start_send
from megatron.mpu.groups import ProcessGroups
from megatron.mpu.mappings import gather_last_dim


class Reader:
    """This rank's part in reading. All ranks read the same tokens at the same time and get the same logits.

    Args:
        stage: the layers of this rank, with weights.
        arch: of the whole model.
        groups: this process's groups.
    """

    def __init__(self, stage: GPT, arch: Architecture, groups: ProcessGroups) -> None:
        self._stage, self._arch, self._groups = stage.eval(), arch, groups
        parameter = next(stage.parameters())
        self.device, self._dtype = parameter.device, torch.float32 if arch.fp32_residual else parameter.dtype

    def __call__(self, tokens: Tensor, inputs: ModelInputs, last: Sequence[int]) -> Tensor:
        """Read tokens.

        Args:
            tokens: [b, s] int64 on any device.
            inputs: their positions (on any device) and the cache.
            last: of each text the token (0 .. s-1) whose logits are wanted.

        Returns:
            [b, v] float32 on the host, v without padding of the vocabulary.
        """
        pipeline = self._groups.pp
        inputs = self._here(inputs)
        x = self._stage.embed(tokens.to(self.device), inputs) if pipeline.rank == 0 else self._received(tokens)
        hidden = self._stage.run_layers(x, inputs)
        if pipeline.rank == pipeline.size - 1:
            rows = hidden[torch.tensor(last, device=hidden.device), torch.arange(len(last), device=hidden.device)]
            logits = gather_last_dim(self._stage.logits(rows[None]), self._groups.tp)[0].float()
        else:
            start_send(hidden, pipeline, pipeline.rank + 1).wait()
            logits = torch.empty(len(last), self._arch.padded_vocab_size, dtype=torch.float32, device=self.device)
        logits = broadcast(logits.contiguous(), pipeline, pipeline.size - 1)
        return logits[:, : self._arch.vocab_size].cpu()

    def _here(self, inputs: ModelInputs) -> ModelInputs:
        """The same on this rank's device."""
        positions = inputs.position_ids
        return inputs if positions is None else replace(inputs, position_ids=positions.to(self.device))

    def _received(self, tokens: Tensor) -> Tensor:
        """Hidden states [s, b, h] from the stage before."""
        batch, length = tokens.shape
        buffer = torch.empty(length, batch, self._arch.hidden_size, dtype=self._dtype, device=self.device)
        return start_receive(buffer, self._groups.pp, self._groups.pp.rank - 1).wait()
