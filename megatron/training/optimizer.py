"""Parameter groups of the optimizer and their schedules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron.mpu.sharding import is_expert
from megatron.training.engine import StepSettings


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Groups as in Megatron: weights, which decay, and biases and norm weights, which do not; those of experts apart.

    `wd_mult` is what the scheduled weight decay is multiplied by. DTensors of another mesh (copies of key-value heads)
    are groups of their own, because one fused operation takes those of one mesh.
    """
    decayed: dict[Any, list[nn.Parameter]] = {}
    free: dict[Any, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            # The biases of experts have an axis more than others.
            decays = parameter.dim() > 1 and not name.endswith(".bias")
            (decayed if decays else free).setdefault((mesh, is_expert(name)), []).append(parameter)
    return [
        *({"params": group, "wd_mult": 1.0} for group in decayed.values()),
        *({"params": group, "wd_mult": 0.0, "weight_decay": 0.0} for group in free.values()),
    ]


def set_schedules(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Write this step's learning rate and weight decay into the optimizer's groups."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
        group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
