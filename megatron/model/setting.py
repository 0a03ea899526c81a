"""What all parts of a model are built with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.config.architecture import Architecture
from megatron.model.recompute import RecomputePlan
from megatron.model.routing import RoutingPlan
from megatron.mpu.deferred import DeferredGradients
from megatron.mpu.groups import ProcessGroups
from megatron.ops import Ops


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The architecture and where it is computed.

    Attributes:
        arch: the shape of the model.
        ops: the kernels.
        groups: this process's groups.
        sequence_parallel: hidden states between layers are split along the sequence over the tensor-parallel ranks.
        recompute: activations to recompute in this pipeline stage.
        deferred: takes over the gradients of the weights of linear layers.
        routing: how tokens are shared out among experts.
        dtype, device: of the parameters.
    """

    arch: Architecture
    ops: Ops
    groups: ProcessGroups
    sequence_parallel: bool = False
    recompute: RecomputePlan = field(default_factory=RecomputePlan)
    deferred: DeferredGradients | None = None
    routing: RoutingPlan = field(default_factory=RoutingPlan)
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    def linear(self) -> dict[str, Any]:
        """Keyword arguments shared by the tensor-parallel layers."""
        return {
            "group": self.groups.tp,
            "sequence_parallel": self.sequence_parallel,
            "deferred": self.deferred,
            "dtype": self.dtype,
            "device": self.device,
        }
