"""The decoder-only transformer: GPT, LLaMA, BLOOM, Mistral and their like are settings of this one model.

Legend: s=sequence, b=micro-batch, h=hidden, v=padded vocabulary, t=tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from megatron.config.architecture import Architecture
from megatron.model.block import Block
from megatron.model.embedding import Embedding
from megatron.model.inputs import LayerInputs, ModelInputs
from megatron.model.norm import Norm
from megatron.model.recompute import RecomputePlan, kept_on_host, recomputed
from megatron.model.rotary import Positions
from megatron.model.routing import RoutingPlan
from megatron.model.setting import Setting
from megatron.mpu.cross_entropy import vocab_parallel_linear_cross_entropy
from megatron.mpu.deferred import DeferredGradients, WeightTask
from megatron.mpu.groups import ProcessGroups
from megatron.mpu.layers import ColumnParallelLinear, VocabParallelEmbedding, column_linears, whole_input
from megatron.mpu.sharding import kv_copies
from megatron.ops import Ops

__all__ = ["GPT", "ModelInputs", "RecomputePlan"]


class GPT(nn.Module):
    """A decoder-only transformer, or one pipeline stage of it.

    Args:
        arch: the shape of the whole model.
        ops: the kernels.
        groups: this process's groups.
        sequence_parallel: split hidden states between layers along the sequence over the tensor-parallel ranks.
        layers: global numbers of the layers held here; None = all.
        first: hold the embedding: the input is token ids.
        last: hold the final norm and the head: the output is logits.
        recompute: activations to recompute in backward, or to keep on the host, in this stage.
        deferred: takes over the gradients of the weights of linear layers, see `mpu.deferred`.
        routing: how tokens are shared out among experts, where the architecture has them.
        dtype, device: of the parameters, which are uninitialised (see `model.weights.initialise_parameters`).

    Raises:
        ValueError: if the architecture cannot be split over the tensor-parallel ranks.
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        ops: Ops,
        groups: ProcessGroups,
        sequence_parallel: bool = False,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        recompute: RecomputePlan | None = None,
        deferred: DeferredGradients | None = None,
        routing: RoutingPlan | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        _check_layout(arch, groups)
        setting = Setting(
            arch=arch,
            ops=ops,
            groups=groups,
            sequence_parallel=sequence_parallel,
            recompute=recompute or RecomputePlan(),
            deferred=deferred,
            routing=routing or RoutingPlan(),
            dtype=dtype,
            device=device,
        )
        self._setting, self._first, self._last = setting, first, last
        self.deferred = deferred
        self._positions = Positions(arch, groups.tp)
        tied_head = last and arch.tied_embeddings
        self.embedding = Embedding(setting, word_only=not first) if first or tied_head else None
        numbers = range(arch.num_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(number): Block(number, setting) for number in numbers})
        self.final_norm = Norm(arch.hidden_size, setting, partial_grad=sequence_parallel) if last else None
        self.head = None
        if last and not arch.tied_embeddings:
            self.head = ColumnParallelLinear(arch.hidden_size, arch.padded_vocab_size, bias=False, **setting.linear())

    def forward(self, x: Tensor, inputs: ModelInputs) -> Tensor:
        """One micro-batch.

        Args:
            x: token ids [b, s] int64 on the first stage, else hidden states [s, b, h] ([s/t, b, h] with sequence
                parallelism) of the stage before.
            inputs: positions, documents, dropout seed, labels.

        Returns:
            Logits [s, b, v/t] on the last stage, in the model's dtype, or losses, see `ModelInputs.labels`; else hidden
            states shaped like the input's.
        """
        hidden = self.embed(x, inputs) if self._first else x
        hidden = self.run_layers(hidden, inputs)
        if not self._last:
            return hidden
        if inputs.labels is None or self._setting.ops.linear_cross_entropy is None:
            return self.logits(hidden)
        return self.losses(hidden, inputs.labels.transpose(0, 1))

    def embed(self, tokens: Tensor, inputs: ModelInputs) -> Tensor:
        """Token ids [b, s] -> hidden states [s, b, h] or [s/t, b, h]; first stage only."""
        assert self.embedding is not None
        return self.embedding(tokens, inputs)

    def run_layers(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Hidden states [s, b, h] or [s/t, b, h] through the layers held here; the same shape and dtype."""
        side = self.layer_inputs(hidden, inputs)
        blocks = list(self.layers.values())
        plan = self._setting.recompute
        if not self.training:
            return _run(blocks, hidden, side)
        for span in plan.spans(len(blocks)):
            chunk = [blocks[at] for at in span.layers]
            weights = [weight for block in chunk for weight in block.parameters()]
            host = kept_on_host(weights, side.tensors(), pinned=plan.pinned) if span.on_host else nullcontext()
            with host:
                hidden = recomputed(_run, chunk, hidden, side) if span.again else _run(chunk, hidden, side)
        return hidden

    def layer_inputs(self, hidden: Tensor, inputs: ModelInputs) -> LayerInputs:
        """What the layers need beside the hidden states [s, b, h] or [s/t, b, h]."""
        split = self._setting.groups.tp.size if self._setting.sequence_parallel else 1
        rotary = self._positions.rotary(hidden.shape[0] * split, inputs.position_ids, hidden.device)
        cos, sin = rotary or (None, None)
        return LayerInputs(
            cos=cos,
            sin=sin,
            alibi_slopes=self._positions.slopes(hidden.device),
            document_ids=inputs.document_ids,
            dropout_seed=inputs.dropout_seed,
            auxiliary=inputs.auxiliary,
            cache=inputs.cache,
            positions=None if inputs.cache is None else inputs.position_ids,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [s, b, h] or [s/t, b, h] -> logits [s, b, v/t]; last stage only."""
        assert self.final_norm is not None
        (result,) = column_linears(self.final_norm(hidden), (self._output_layer(),))
        return result

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Hidden states and labels [s, b] -> losses [s, b] float32, without all logits at a time; last stage only."""
        assert self.final_norm is not None
        layer, setting = self._output_layer(), self._setting
        return vocab_parallel_linear_cross_entropy(
            whole_input(self.final_norm(hidden), layer),
            layer.own(layer.weight),
            labels,
            vocab_size=setting.arch.vocab_size,
            group=layer.group,
            ops=setting.ops,
        )

    def _output_layer(self) -> ColumnParallelLinear | VocabParallelEmbedding:
        if self.head is not None:
            return self.head
        assert self.embedding is not None
        return self.embedding.word

    def weight_gradients(self, tasks: Sequence[WeightTask]) -> Tensor:
        """A scalar zero whose backward computes weight gradients that were deferred.

        Args:
            tasks: at least one, collected by `deferred`.
        """
        return torch.stack([task.as_zero() for task in tasks]).sum()


def _run(blocks: Sequence[nn.Module], hidden: Tensor, inputs: LayerInputs) -> Tensor:
    for block in blocks:
        hidden = block(hidden, inputs)
    return hidden


def _check_layout(arch: Architecture, groups: ProcessGroups) -> None:
    tp = groups.tp.size
    split = {
        "attention heads": arch.num_heads,
        "feed-forward features": arch.ffn_hidden_size,
        "vocabulary rows": arch.padded_vocab_size,
    }
    for what, count in split.items():
        if count % tp:
            raise ValueError(
                f"--tensor-model-parallel-size is {tp}, but the model has {count} {what}; it must divide {count}"
            )
    copies, needed = groups.kv_copies.size if groups.kv_copies else 1, kv_copies(arch.num_kv_heads, tp)
    if copies != needed:
        raise ValueError(f"{arch.num_kv_heads} kv heads on {tp} ranks need {needed} copies, the groups have {copies}")
    if arch.num_heads % arch.num_kv_heads:
        raise ValueError(f"{arch.num_kv_heads} kv heads must divide {arch.num_heads} attention heads")
    if (arch.num_heads // tp) % groups.ulysses.size:
        raise ValueError(
            f"--ds-sequence-parallel-size is {groups.ulysses.size}; it must divide the {arch.num_heads // tp} "
            "attention heads of a tensor-parallel rank"
        )
    if groups.ring.size > 1 and arch.attention_dropout > 0.0:
        raise ValueError(
            f"--attention-dropout is {arch.attention_dropout}; with --context-parallel-size above 1 it must be 0"
        )
