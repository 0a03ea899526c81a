"""From settings to a plan for routers and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.architecture import Architecture
from megatron.model.capacity import exponential_bins, given_bins
from megatron.model.routing import RoutingPlan


def routing_plan(s: Mapping[str, Any], arch: Architecture) -> RoutingPlan | None:
    """How tokens are shared out among experts; None for a model without.

    Args:
        s: complete settings by name.
        arch: the model.

    Raises:
        ValueError: capacity bins that cannot be.
    """
    if arch.experts is None:
        return None
    balancing = s["moe_router_load_balancing_type"]
    sequences = s["context_parallel_size"] * s["ds_sequence_parallel_size"]
    tokens = s["micro_batch_size"] * s["seq_length"] // sequences
    return RoutingPlan(
        balance_coeff=0.0 if balancing == "none" else s["moe_loss_coeff"],
        z_coeff=s["moe_z_loss_coeff"] or 0.0,
        balancing=balancing,
        train_capacity_factor=s["moe_train_capacity_factor"] if s["moe_token_dropping"] else None,
        eval_capacity_factor=s["moe_eval_capacity_factor"] if s["moe_token_dropping"] else None,
        min_capacity=s["moe_min_capacity"],
        drop_policy=s["moe_token_drop_policy"],
        pad=s["moe_pad_expert_input_to_capacity"],
        bins=_bins(s, tokens, arch.experts.count, arch.experts.topk),
        sampled_second=s["moe_top2_2nd_expert_sampling"],
    )


def _bins(s: Mapping[str, Any], tokens: int, experts: int, topk: int) -> tuple[int, ...] | None:
    """Numbers to which the `tokens` of a micro-batch on one rank are rounded up for every expert."""
    count = s["moe_num_capacity_bins"]
    if count == 0:
        return None
    given = given_bins(s["moe_capacity_bins"] or (), experts)
    if given is None:
        base, alignment = s["moe_capacity_bins_exp_base"], s["moe_capacity_bins_alignment"]
        return exponential_bins(tokens, experts, topk, count, base, alignment)
    if len(given) != count:
        raise ValueError(
            f"--moe-capacity-bins gives {len(given)} bins for {experts} experts, --moe-num-capacity-bins says "
            f"{count}: they must agree"
        )
    return given
