"""One transformer layer."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.model.attention import Attention
from megatron.model.inputs import LayerInputs
from megatron.model.mlp import MLP
from megatron.model.moe import MoE
from megatron.model.norm import Norm
from megatron.model.recompute import recomputed
from megatron.model.setting import Setting
from megatron.mpu.random import Site, dropout_seed, seed_device


class Block(nn.Module):
    """Pre-norm transformer layer: attention and feed-forward block, each added to the residual stream.

    Args:
        layer: global layer number, from 0.
        setting: of the model.
    """

    def __init__(self, layer: int, setting: Setting) -> None:
        super().__init__()
        arch, partial_grad = setting.arch, setting.sequence_parallel
        self._layer, self._setting = layer, setting
        self.attention_norm = Norm(arch.hidden_size, setting, partial_grad=partial_grad)
        self.attention = Attention(layer, setting)
        self.mlp_norm = Norm(arch.hidden_size, setting, partial_grad=partial_grad)
        self.mlp = MoE(layer, setting) if arch.has_experts(layer) else MLP(setting)

    def forward(self, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """[s, b, h] (or [s/t, b, h] with sequence parallelism) -> the same shape and dtype."""
        normed = self.attention_norm(hidden)
        output, bias = self.attention(normed, inputs)
        hidden = self._add(output, bias, hidden, normed, "attention_output", inputs)
        normed = self.mlp_norm(hidden)
        again = self._setting.recompute.granularity == "mlp" and self.training
        output, bias = recomputed(self.mlp, normed, inputs) if again else self.mlp(normed, inputs)
        return self._add(output, bias, hidden, normed, "mlp_output", inputs)

    def _add(
        self, output: Tensor, bias: Tensor | None, hidden: Tensor, normed: Tensor, site: Site, inputs: LayerInputs
    ) -> Tensor:
        """Hidden (or normed, with residual_post_norm) + dropout(output + bias), in the dtype of `hidden`."""
        setting = self._setting
        residual = normed.to(hidden.dtype) if setting.arch.residual_post_norm else hidden
        p = setting.arch.hidden_dropout
        if p > 0.0 and self.training:
            split = setting.sequence_parallel
            seed = dropout_seed(inputs.dropout_seed, self._layer, site, setting.groups, split=split)
            seed_device(output.device, seed)
        return setting.ops.bias_dropout_add(output, bias, residual, p, self.training)
