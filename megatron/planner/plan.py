"""A plan: one layout with its memory, its traffic and its speed, or what speaks against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.model.recompute import RecomputePlan
from megatron.planner.case import Case, case_of
from megatron.planner.communication import Traffic, step_traffic
from megatron.planner.machines import Machine
from megatron.planner.memory import RankMemory, rank_memory, worst_rank
from megatron.planner.request import Request, Resolved, resolve
from megatron.planner.step_time import Speed, speed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout that is possible, whether or not it fits.

    Attributes:
        case: what was planned.
        missing: features that training lacks, so that it refuses the layout today.
        memory: of the ranks at each place of the pipeline.
        traffic: of the same.
        speed: of a step.
        by_recompute: memory of the fullest rank by what is recomputed.
    """

    case: Case
    missing: tuple[str, ...]
    memory: tuple[RankMemory, ...]
    traffic: tuple[tuple[Traffic, ...], ...]
    speed: Speed
    by_recompute: Mapping[str, RankMemory]

    @property
    def needed(self) -> int:
        """Bytes of the fullest rank."""
        return max(found.peak.total for found in self.memory)

    @property
    def fits(self) -> bool:
        """Whether every rank has enough memory."""
        return self.needed <= self.case.machine.usable


@dataclass(frozen=True)
class Refused:
    """A layout that cannot be.

    Attributes:
        reasons: one sentence for each.
    """

    reasons: tuple[str, ...]


def make_plan(request: Request, machine: Machine, changes: Mapping[str, Any] | None = None) -> Plan | Refused:
    """Plan the layout of a request, with some settings changed."""
    found = possible_case(request, machine, changes)
    if isinstance(found, Refused):
        return found
    case, resolved = found
    places = range(case.pp)
    return Plan(
        case=case,
        missing=resolved.missing,
        memory=tuple(rank_memory(case, place) for place in places),
        traffic=tuple(step_traffic(case, place) for place in places),
        speed=speed(case),
        by_recompute={name: worst_rank(replace(case, recompute=plan)) for name, plan in _MODES.items()},
    )


_MODES: Mapping[str, RecomputePlan] = {
    "none": RecomputePlan(),
    "selective": RecomputePlan(granularity="selective"),
    "mlp": RecomputePlan(granularity="mlp"),
    "full": RecomputePlan(granularity="full"),
}


def possible_case(
    request: Request, machine: Machine, changes: Mapping[str, Any] | None = None
) -> tuple[Case, Resolved] | Refused:
    """The case that a request describes, unless it breaks a rule."""
    resolved = resolve(request, changes)
    if resolved.impossible:
        return Refused(resolved.impossible)
    try:
        return case_of(resolved.settings, request.vocab_size, machine, request.document), resolved
    except ValueError as problem:  # capacity bins that a micro-batch cannot have
        return Refused((str(problem),))
