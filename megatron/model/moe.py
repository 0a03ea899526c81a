"""Mixture of experts: a feed-forward layer of many blocks, of which every token visits a few (Shazeer et al. 2017).

Legend: s=sequence, b=micro-batch, h=hidden, f=inner features, E=experts, k=experts of a token, t=tensor-parallel ranks,
e=expert-parallel ranks, m=rows of all experts of this rank.
An expert is split over the tensor-parallel ranks like a dense layer, and the experts of a layer over the
expert-parallel ranks. All tensor-parallel ranks route all tokens of their data shard.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.model import capacity
from megatron.model.dispatch import Dispatch, count_choices, dispatch_all, dispatch_limited
from megatron.model.inputs import LayerInputs
from megatron.model.mlp import MLP, activate
from megatron.model.router import Choice, Router, with_losses
from megatron.model.setting import Setting
from megatron.mpu.expert_parallel import expert_group, largest, plan_journey
from megatron.mpu.layers import replicated
from megatron.mpu.local import local
from megatron.mpu.mappings import copy_to_region, gather_sequence, reduce_from_region, reduce_scatter_sequence


class MoE(nn.Module):
    """Router and experts, and the block that every token visits besides, if there is one.

    Args:
        layer: global layer number, from 0.
        setting: of the model; it has experts.

    Raises:
        ValueError: if experts or their features cannot be divided among the ranks.
    """

    def __init__(self, layer: int, setting: Setting) -> None:
        super().__init__()
        assert setting.arch.experts is not None
        self._setting, self._shape = setting, setting.arch.experts
        self.router = Router(layer, setting)
        self.experts = Experts(setting)
        shared = self._shape.shared_ffn_hidden_size
        self.shared = MLP(setting, ffn_hidden_size=shared) if shared else None

    def forward(self, x: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (or [s/t, b, h]) -> the same, and the shared block's bias [h] (or None), not yet added."""
        tp, split = self._setting.groups.tp, self._setting.sequence_parallel
        tokens = gather_sequence(x, tp, partial_grad=True) if split else copy_to_region(x, tp)
        mixed = self._mix(tokens.flatten(0, 1), self.router(tokens, inputs), inputs).view_as(tokens)
        output = reduce_scatter_sequence(mixed, tp) if split else reduce_from_region(mixed, tp)
        if self.shared is None:
            return output, None
        shared, bias = self.shared(x, inputs)
        return output + shared, bias

    def _mix(self, tokens: Tensor, choice: Choice, inputs: LayerInputs) -> Tensor:
        """Tokens [s*b, h] -> weighted sums of their experts' results, of which each rank has a part [s*b, h]."""
        counts = count_choices(choice.experts, self._shape.count)
        dispatch, padded_to = self._dispatch(choice, counts)
        weights = choice.weights
        if self.training and inputs.auxiliary is not None:
            kept = torch.minimum(counts, dispatch.counts).sum()
            weights = with_losses(choice, choice.experts.numel() - kept, self._setting, inputs.auxiliary)
        journey = plan_journey(dispatch.counts, expert_group(self._setting.groups), padded_to=padded_to)
        rows = journey.out(dispatch.gather(tokens, self._shape.topk))
        return dispatch.combine(journey.back(self.experts(rows, journey.counts)), weights)

    def _dispatch(self, choice: Choice, counts: Tensor) -> tuple[Dispatch, int | None]:
        """Which choices the experts take, and the number of rows of each expert if it is the same on all ranks."""
        routing, tokens = self._setting.routing, choice.experts.shape[0]
        factor = routing.train_capacity_factor if self.training else routing.eval_capacity_factor
        limit, pad = None, routing.pad
        if factor is not None:
            limit = capacity.capacity(tokens, self._shape.count, self._shape.topk, factor, routing.min_capacity)
        elif routing.bins is not None:
            busiest = largest(counts.max(), expert_group(self._setting.groups))
            limit, pad = capacity.rounded(busiest, routing.bins), True
        if limit is None:
            return dispatch_all(choice.experts, counts), None
        limited = dispatch_limited(
            choice.experts, counts, choice.weights, limit=limit, policy=routing.drop_policy, pad=pad
        )
        return limited, limit if pad else None


class Experts(nn.Module):
    """The experts of this rank, each split over the tensor-parallel ranks.

    Args:
        setting: of the model; it has experts.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        arch, shape = setting.arch, setting.arch.experts
        assert shape is not None
        self._setting = setting
        group = expert_group(setting.groups)
        if shape.count % group.size:
            raise ValueError(
                f"--moe-expert-parallel-size is {group.size}; it must divide the {shape.count} experts (--num-experts)"
            )
        tp = setting.groups.tp.size
        if shape.ffn_hidden_size % tp:
            raise ValueError(
                f"--tensor-model-parallel-size is {tp}; it must divide the {shape.ffn_hidden_size} inner features of "
                "an expert (--moe-ffn-hidden-size)"
            )
        count, inner = shape.count // group.size, shape.ffn_hidden_size // tp
        self.gate = GroupedLinear(count, arch.hidden_size, inner, setting, sums=False) if arch.gated else None
        self.up = GroupedLinear(count, arch.hidden_size, inner, setting, sums=False)
        self.down = GroupedLinear(count, inner, arch.hidden_size, setting, sums=True)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows: [m, h], sorted by expert.
            counts: rows of each expert, int64 [E/e].

        Returns:
            [m, h], of which the sum over the tensor-parallel ranks is the result.
        """
        gate = None if self.gate is None else self.gate(rows, counts)
        inner = activate(self._setting.ops, self._setting.arch.activation, self.up(rows, counts), gate)
        return self.down(inner, counts)


class GroupedLinear(nn.Module):
    """One linear layer per expert, with their weights in one tensor.

    Args:
        count: experts of this rank.
        in_features: i, of this rank.
        out_features: o, of this rank.
        setting: of the model.
        sums: the results of the tensor-parallel ranks are summed, so one of them adds the biases for all.
    """

    def __init__(self, count: int, in_features: int, out_features: int, setting: Setting, *, sums: bool) -> None:
        super().__init__()
        made = {"dtype": setting.dtype, "device": setting.device}
        self._ops, self._tp, self._sums = setting.ops, setting.groups.tp, sums
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features, **made))
        self.bias = nn.Parameter(torch.empty(count, out_features, **made)) if setting.arch.linear_bias else None

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert [m, i] and counts of them [E/e] -> [m, o]."""
        result = self._ops.grouped_matmul(rows, local(self.weight), counts)
        if self.bias is None:
            return result
        bias = replicated(self.bias, self._tp, partial_grad=self._sums)
        if self._sums and self._tp.rank > 0:
            bias = bias * 0.0
        return result + bias.repeat_interleave(counts, dim=0, output_size=rows.shape[0])
