"""What all parts of a model are built with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megatron.config.architecture import Architecture
from megatron.mpu.deferred import DeferredGradients
from megatron.mpu.groups import ProcessGroups
from megatron.ops import Ops


@dataclass(frozen=True, kw_only=True)
class RecomputePlan:
    """Which activations are recomputed in backward instead of being kept.

    Attributes:
        granularity: "none"; "selective" = the attention core (scores, softmax, weighted sum) of every layer;
            "full" = whole layers, keeping only their inputs.
        method: with "full": "uniform" recomputes all layers in chunks of `num_layers`, keeping one input per chunk;
            "block" recomputes the first `num_layers` layers of this pipeline stage and keeps the rest.
        num_layers: see `method`.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"--recompute-num-layers is {self.num_layers}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The architecture and where it is computed.

    Attributes:
        arch: the shape of the model.
        ops: the kernels.
        groups: this process's groups.
        sequence_parallel: hidden states between layers are split along the sequence over the tensor-parallel ranks.
        recompute: activations to recompute.
        deferred: takes over the gradients of the weights of linear layers.
        dtype, device: of the parameters.
    """

    arch: Architecture
    ops: Ops
    groups: ProcessGroups
    sequence_parallel: bool = False
    recompute: RecomputePlan = field(default_factory=RecomputePlan)
    deferred: DeferredGradients | None = None
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
