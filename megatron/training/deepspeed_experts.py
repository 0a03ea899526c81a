"""Experts under DeepSpeed: which parameters they are, and over which ranks their gradients are summed.

DeepSpeed knows experts by a module of its own class and by marks on parameters and their groups. The layers are ours;
the module is there to be recognised, and hands DeepSpeed our process groups under the name that the marks refer to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron.mpu.groups import ExpertGroups
from megatron.mpu.sharding import is_expert

_MODULE = "experts_for_deepspeed"


def announce_experts(model: nn.Module, optimizer: torch.optim.Optimizer, groups: ExpertGroups, experts: int) -> None:
    """Make DeepSpeed treat the experts of a model as such; to be called before `deepspeed.initialize`.

    Args:
        model: its parameters are named logically.
        optimizer: of these parameters; groups of it hold experts alone or none.
        groups: the ranks that share experts.
        experts: number of experts of a layer.
    """
    name = f"ep_size_{groups.ep.size}"
    for parameter_name, parameter in model.named_parameters():
        if is_expert(parameter_name):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = name  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        if not getattr(group["params"][0], "allreduce", True):
            group.update(moe=True, name=name)
    model.add_module(_MODULE, _announcement(name, groups, experts))


def _announcement(name: str, groups: ExpertGroups, experts: int) -> nn.Module:
    """A module without parameters that DeepSpeed asks for the groups."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as theirs

    class Announcement(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = experts

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            mesh: Any = groups.mesh
            same = mesh["edp_replicate"]
            theirs._EXPERT_PARALLEL_GROUP[name] = groups.ep.handle
            theirs._EXPERT_PARALLEL_GROUP_RANKS[name] = list(groups.ep.ranks)
            theirs._EXPERT_DATA_PARALLEL_GROUP[name] = same.get_group()
            theirs._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = same.mesh.tolist()
            # Norms of experts that are split over the tensor-parallel ranks are summed over them.
            theirs.expert_tensor_parallel_world_size = mesh["tp"].size()

    return Announcement()
