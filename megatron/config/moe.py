"""Settings of mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Experts and their router."""

    num_experts: tuple[int, ...] = option(
        (1,), "Number of experts: one number, or one per layer with experts.", minimum=1
    )
    mlp_type: Literal["standard", "residual"] = option("standard", "residual adds a dense block beside the experts.")
    topk: int = option(1, "Experts that one token goes to.", aliases=("--moe-router-topk",), minimum=1)
    expert_interval: int = option(2, "Every how many layers a layer has experts.", minimum=1)
    moe_expert_parallel_size: int = option(
        1, "Ranks that share the experts.", aliases=("--expert-model-parallel-size",), minimum=1
    )
    enable_expert_tensor_parallelism: bool = option(False, "Share each expert among the tensor-parallel ranks.")
    moe_token_dropping: bool = option(True, "Let experts take any number of tokens.", "--disable-moe-token-dropping")
    moe_train_capacity_factor: float = option(
        1.0, "Tokens an expert takes in training, as a factor of an equal share.", minimum=0
    )
    moe_eval_capacity_factor: float = option(
        1.0, "Tokens an expert takes in evaluation, as a factor of an equal share.", minimum=0
    )
    moe_min_capacity: int = option(4, "Tokens that every expert can take at least.", minimum=0)
    moe_loss_coeff: float = option(
        0.1, "Factor of the load-balancing loss.", aliases=("--moe-aux-loss-coeff",), minimum=0
    )
    create_moe_param_group: bool = option(False, "DeepSpeed: parameter groups of their own for experts.")
    moe_top2_2nd_expert_sampling: bool = option(
        True, "Choose the second expert by its score alone.", "--disable-moe-top2-2nd-expert-sampling"
    )
