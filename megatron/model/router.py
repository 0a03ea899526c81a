"""The router: which experts every token visits, with what weight, and the losses that keep the experts balanced.

Legend: s=sequence, b=micro-batch, h=hidden, E=experts, k=experts of a token, N=tokens (s*b).
Every tensor-parallel rank routes the same tokens. What follows from the routing is a part of a sum on each of them, so
gradients here are parts, too: they are summed where hidden states and weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.model.inputs import Auxiliary, LayerInputs
from megatron.model.setting import Setting
from megatron.mpu import collectives
from megatron.mpu.layers import replicated
from megatron.mpu.random import dropout_seed, seed_device


@dataclass(frozen=True)
class Choice:
    """What the router decided.

    Attributes:
        experts: [N, k] int64, the best first.
        weights: [N, k], at least float32, of their results.
        losses: balance and z loss: this rank's part, without factors; [2] of the same dtype.
    """

    experts: Tensor
    weights: Tensor
    losses: Tensor


class Router(nn.Module):
    """A linear layer in (at least) float32 whose best outputs choose the experts.

    Args:
        layer: global layer number, from 0.
        setting: of the model; it has experts.
    """

    def __init__(self, layer: int, setting: Setting) -> None:
        super().__init__()
        assert setting.arch.experts is not None
        self._layer, self._setting, self._experts = layer, setting, setting.arch.experts
        shape = (self._experts.count, setting.arch.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=setting.dtype, device=setting.device))

    def forward(self, x: Tensor, inputs: LayerInputs) -> Choice:
        """[s, b, h], all tokens of this data shard -> the experts of each."""
        weight = replicated(self.weight, self._setting.groups.tp, partial_grad=True)
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), weight.to(wide))  # [s, b, E]
        scores = logits.softmax(dim=-1)
        experts = self._choose(logits, inputs)  # [s, b, k]
        chosen = scores.gather(-1, experts)
        weights = chosen if self._experts.pre_softmax else chosen / chosen.sum(-1, keepdim=True)
        losses = torch.stack((self._balance(scores, experts), self._z(logits)))
        return Choice(experts.flatten(0, 1), weights.flatten(0, 1), losses)

    def _choose(self, logits: Tensor, inputs: LayerInputs) -> Tensor:
        """Experts with the largest logits; the second of two is drawn at random in training, if that is asked for."""
        sampled = self._setting.routing.sampled_second and self._experts.topk == 2 and self.training
        if not sampled:
            return logits.topk(self._experts.topk, dim=-1).indices
        seed = dropout_seed(inputs.dropout_seed, self._layer, "router", self._setting.groups, split=False)
        seed_device(logits.device, seed)
        first = logits.argmax(dim=-1, keepdim=True)
        # The largest of logits with Gumbel noise is a draw from their softmax (Gumbel 1954).
        noisy = logits.detach() - torch.empty_like(logits).exponential_().log()
        second = noisy.scatter(-1, first, float("-inf")).argmax(dim=-1, keepdim=True)
        return torch.cat((first, second), dim=-1)

    def _balance(self, scores: Tensor, experts: Tensor) -> Tensor:
        """E * sum over experts of (share of the choices) * (mean score): 1 when balanced (Fedus et al. 2021).

        Context-parallel ranks hold parts of the sequences: shares are over all of them, mean scores are parts.
        """
        cp, count = self._setting.groups.cp, self._experts.count
        over = (0,) if self._setting.routing.balancing == "seq_aux_loss" else (0, 1)
        chosen = torch.zeros_like(scores).scatter_(-1, experts, 1.0)
        shares = collectives.all_reduce(chosen.mean(over), cp) / (cp.size * self._experts.topk)
        return count * (shares * scores.mean(over) / cp.size).sum(-1).mean()

    def _z(self, logits: Tensor) -> Tensor:
        """Mean square of the logarithm of the softmax's denominator (Zoph et al. 2022)."""
        return logits.logsumexp(dim=-1).square().mean() / self._setting.groups.cp.size


class _WithLosses(torch.autograd.Function):
    """Lets a tensor pass and adds the gradient of losses to its backward pass, as Megatron-LM does.

    The losses then need no way out of the layer, through pipeline stages to the last one. They are noted down in the
    backward pass, which comes once, however often the forward pass is computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, figures: Tensor, auxiliary: Auxiliary) -> Tensor:
        ctx.save_for_backward(figures)
        ctx.auxiliary = auxiliary
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (figures,) = ctx.saved_tensors
        auxiliary: Auxiliary = ctx.auxiliary
        auxiliary.totals.add_(figures)
        return grad, torch.as_tensor(auxiliary.weight, dtype=figures.dtype, device=figures.device), None, None


def with_losses(choice: Choice, dropped: Tensor, setting: Setting, auxiliary: Auxiliary) -> Tensor:
    """The weights of a choice, whose backward pass adds the gradient of the router's losses and notes figures down.

    Args:
        choice: of one layer.
        dropped: choices that the experts do not take; scalar.
        setting: of the model.
        auxiliary: of the micro-batch.
    """
    routing = setting.routing
    factors = choice.losses.new_tensor((routing.balance_coeff, routing.z_coeff))
    # Every tensor-parallel rank adds the same loss, and their gradients are summed.
    loss = (choice.losses * factors).sum() / setting.groups.tp.size
    counts = torch.stack((dropped, torch.full_like(dropped, choice.experts.numel())))
    figures = torch.cat((choice.losses.detach(), counts.to(choice.losses.dtype)))
    weights: Tensor = _WithLosses.apply(choice.weights, loss, figures, auxiliary)
    return weights
