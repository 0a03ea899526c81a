"""From settings to a plan for routers and experts."""

from __future__ import annotations

from megatron.config.architecture import Architecture
from megatron.config.moe import MoeConfig
from megatron.config.run import RunConfig
from megatron.model.capacity import exponential_bins, given_bins
from megatron.model.routing import RoutingPlan


def routing_plan(config: RunConfig, arch: Architecture) -> RoutingPlan | None:
    """How tokens are shared out among experts; None for a model without.

    Raises:
        ValueError: capacity bins that cannot be.
    """
    moe = config.moe
    if arch.experts is None:
        return None
    balancing = moe.moe_router_load_balancing_type
    sequences = config.parallel.context_parallel_size * config.parallel.ds_sequence_parallel_size
    tokens = config.training.micro_batch_size * config.data.seq_length // sequences
    return RoutingPlan(
        balance_coeff=0.0 if balancing == "none" else moe.moe_loss_coeff,
        z_coeff=moe.moe_z_loss_coeff or 0.0,
        balancing=balancing,
        train_capacity_factor=moe.moe_train_capacity_factor if moe.moe_token_dropping else None,
        eval_capacity_factor=moe.moe_eval_capacity_factor if moe.moe_token_dropping else None,
        min_capacity=moe.moe_min_capacity,
        drop_policy=moe.moe_token_drop_policy,
        pad=moe.moe_pad_expert_input_to_capacity,
        bins=_bins(moe, tokens, arch.experts.count, arch.experts.topk),
        sampled_second=moe.moe_top2_2nd_expert_sampling,
    )


def _bins(moe: MoeConfig, tokens: int, experts: int, topk: int) -> tuple[int, ...] | None:
    """Numbers to which the `tokens` of a micro-batch on one rank are rounded up for every expert."""
    if moe.moe_num_capacity_bins == 0:
        return None
    given = given_bins(moe.moe_capacity_bins or (), experts)
    if given is None:
        base, alignment = moe.moe_capacity_bins_exp_base, moe.moe_capacity_bins_alignment
        return exponential_bins(tokens, experts, topk, moe.moe_num_capacity_bins, base, alignment)
    if len(given) != moe.moe_num_capacity_bins:
        raise ValueError(
            f"--moe-capacity-bins gives {len(given)} bins for {experts} experts, --moe-num-capacity-bins says "
            f"{moe.moe_num_capacity_bins}: they must agree"
        )
    return given
