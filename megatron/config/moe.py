"""Settings of mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option, resolved


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Experts and their router; docs/moe.md explains them."""

    num_experts: tuple[int, ...] = option((1,), "Number of experts of a layer; 1 = no experts.", minimum=1)
    mlp_type: Literal["standard", "residual"] = option(
        "standard", "What stands beside the experts: only standard; for a block beside them, see the shared experts."
    )
    topk: int = option(1, "Experts that one token goes to.", aliases=("--moe-router-topk",), minimum=1)
    expert_interval: int = option(2, "Every how many layers a layer has experts, counted from 1.", minimum=1)
    moe_layer_freq: str | None = option(
        None,
        "Which layers have experts, instead of the interval: a number n for layers 0, n, 2 n ..., or a list with 1 for "
        "layers with experts, such as [1]*3+[0,1]*2.",
    )
    moe_ffn_hidden_size: int | None = option(
        None, "Width of the inner layer of an expert. Default: --ffn-hidden-size.", minimum=1
    )
    moe_shared_expert_intermediate_size: int | None = option(
        None, "Width of the inner layer of a block that every token visits besides its experts.", minimum=1
    )
    moe_expert_parallel_size: int = option(
        1, "Ranks that share the experts.", aliases=("--expert-model-parallel-size",), minimum=1
    )
    expert_tensor_parallel_size: int = resolved(
        "Ranks that share each expert. Default, and only value: --tensor-model-parallel-size.", minimum=1
    )
    moe_router_pre_softmax: bool = option(
        False, "Weigh experts by their shares among all experts, not among the chosen ones; always so with one of them."
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] = option(
        "aux_loss", "Over what the load-balancing loss balances: a micro-batch, each sequence, or nothing."
    )
    moe_loss_coeff: float = option(
        0.1, "Factor of the load-balancing loss.", aliases=("--moe-aux-loss-coeff",), minimum=0
    )
    moe_z_loss_coeff: float | None = option(None, "Factor of the loss that keeps router logits small.", minimum=0)
    moe_top2_2nd_expert_sampling: bool = option(
        True,
        "With two experts per token, choose the second one in training by its score alone.",
        "--disable-moe-top2-2nd-expert-sampling",
    )
    moe_token_dropping: bool = option(True, "Let experts take any number of tokens.", "--disable-moe-token-dropping")
    moe_expert_capacity_factor: float | None = option(
        None, "Tokens an expert takes, as a factor of an equal share; without it, see the two factors below.", minimum=0
    )
    moe_train_capacity_factor: float = option(
        1.0, "Tokens an expert takes in training, as a factor of an equal share.", minimum=0
    )
    moe_eval_capacity_factor: float = option(
        1.0, "Tokens an expert takes in evaluation, as a factor of an equal share.", minimum=0
    )
    moe_min_capacity: int = option(4, "Tokens that every expert can take at least.", minimum=0)
    moe_token_drop_policy: Literal["probs", "position"] = option(
        "probs", "Which tokens an expert keeps that has too many: those with the highest scores, or the first ones."
    )
    moe_pad_expert_input_to_capacity: bool = option(
        False, "Fill up the tokens of every expert to its capacity, so that shapes never change."
    )
    moe_num_capacity_bins: int = option(
        0, "Round the tokens of experts that drop none up to one of so many numbers; 0 = do not.", minimum=0
    )
    moe_capacity_bins: tuple[str, ...] | None = option(
        None, "These numbers themselves, as experts,number,number,...; more such words for other numbers of experts."
    )
    moe_capacity_bins_exp_base: float = option(
        2.0, "Factor by which each bin is wider than the one before.", minimum=1
    )
    moe_capacity_bins_alignment: int = option(1, "What these numbers of tokens are multiples of.", minimum=1)
