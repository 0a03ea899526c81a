"""Weights in 16 bits with float32 masters, for a model that one data-parallel rank holds alone.

FSDP2 does the same for several ranks, by gathering shards and reducing gradients in buffers of its own. One rank needs
neither: the optimizer works on the masters, gradients are summed into float32 beside them as soon as backward has made
them, and after a step the masters are rounded into the weights that the model computes with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.mpu.local import local


class HalfWeights:
    """Puts 16-bit weights into a model in place of its float32 parameters, which become the masters.

    Args:
        model: its parameters are float32, plain or DTensors.
        dtype: that the model is to compute in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.masters = dict(model.named_parameters())
        self._halves: list[Tensor] = []
        for name, master in self.masters.items():
            half = nn.Parameter(master.detach().to(dtype))
            half.register_post_accumulate_grad_hook(_summing_into(master))
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, half)
            self._halves.append(half)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the weights, after a step or a load."""
        torch._foreach_copy_([local(half) for half in self._halves], [local(m) for m in self.masters.values()])


def _summing_into(master: nn.Parameter) -> Callable[[Tensor], None]:
    """What is done with the gradient of a 16-bit weight: add it to the master's, in a buffer that stays."""
    total = torch.zeros_like(master)

    @torch.no_grad()
    def collect(half: Tensor) -> None:
        assert half.grad is not None
        gradient, half.grad = half.grad, None
        if master.grad is None:
            local(total).copy_(local(gradient))
            master.grad = total
        else:
            local(total).add_(local(gradient))

    return collect
