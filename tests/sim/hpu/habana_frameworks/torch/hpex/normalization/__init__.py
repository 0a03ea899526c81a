"""SIMULATION of habana_frameworks.torch.hpex.normalization."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from habana_frameworks.torch import _check
from habana_frameworks.torch.core import step_closure


class RmsNormBwdMode(Enum):
    """How the real backward splits its work."""

    DEFAULT = 0
    STATIC_CASE_WIDTH_PARTITIONING = 1


class FusedRMSNorm(torch.autograd.Function):
    """`FusedRMSNorm.apply(x, gamma, eps)`."""

    @staticmethod
    def forward(
        ctx: Any,
        data_in: Tensor,
        gamma: Tensor,
        eps: float,
        use_stages: bool = True,
        bwd_mode: int = 0,
        fast_math: bool = False,
    ) -> Tensor:
        _check.rms_norm(data_in, gamma, eps)
        _check.require(not fast_math, "the simulation has no fast_math")
        result, inverse_rms = torch.ops.hpu.rms_norm(data_in, gamma, eps)
        ctx.save_for_backward(inverse_rms, data_in, gamma)
        ctx.settings = use_stages, bwd_mode
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse_rms, data_in, gamma = ctx.saved_tensors
        gradients = torch.ops.hpu.rms_norm_backward(grad, data_in, gamma, inverse_rms, *ctx.settings)
        return (*gradients, None, None, None, None)


class FusedClipNorm:
    """Clips gradients to a norm, on the device."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> None:
        parameters = list(parameters)
        self.dtype = parameters[0].dtype if parameters else torch.float32
        self.max_norm_t = (torch.ones(1) * max_norm).to(self.dtype).to("hpu")
        self.norm_type = 2.0

    def clip_norm(self, parameters: Iterable[torch.nn.Parameter] | Tensor) -> Tensor:
        """Scale the gradients in place and return their norm before that."""
        step_closure._mark_step_if_lazy()
        given = [parameters] if isinstance(parameters, Tensor) else parameters
        gradients = [parameter.grad for parameter in given if parameter.grad is not None]
        if not gradients:
            return torch.tensor(0.0)
        place = torch.zeros(1, dtype=self.dtype, device="hpu")
        total = torch.ops.hpu.fused_clip_norm([*gradients, place], self.max_norm_t, self.norm_type)
        step_closure._mark_step_if_lazy()
        return total
