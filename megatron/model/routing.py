"""How tokens are shared out among experts: what may be set beside the shape of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Balancing = Literal["aux_loss", "seq_aux_loss", "none"]


@dataclass(frozen=True, kw_only=True)
class RoutingPlan:
    """Losses of the router, and how many tokens an expert takes.

    Attributes:
        balance_coeff: factor of the load-balancing loss.
        z_coeff: factor of the z loss.
        balancing: over what the load is balanced: a micro-batch, each sequence, or nothing.
        train_capacity_factor, eval_capacity_factor: tokens that an expert takes of a micro-batch of one rank, as a
            factor of an equal share; None = any number.
        min_capacity: the least of that.
        drop_policy: which tokens an expert keeps: those with the highest scores, or the first ones.
        pad: fill up the tokens of every expert to its capacity.
        bins: ascending numbers, to one of which the tokens of the busiest expert are rounded up; None = no rounding.
        sampled_second: with two experts per token, the second is drawn at random in training (by Gumbel noise).
    """

    balance_coeff: float = 0.0
    z_coeff: float = 0.0
    balancing: Balancing = "aux_loss"
    train_capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 0
    drop_policy: Literal["probs", "position"] = "probs"
    pad: bool = False
    bins: tuple[int, ...] | None = None
    sampled_second: bool = False
