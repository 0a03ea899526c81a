"""Which layouts there are, which of them fit, and which is quickest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.config import pipeline
from megatron.config.parser import all_options, defaults
from megatron.planner.case import Case
from megatron.planner.machines import Machine
from megatron.planner.memory import rank_memory
from megatron.planner.plan import Refused, possible_case
from megatron.planner.request import Request
from megatron.planner.step_time import Speed, speed

_MICRO_BATCHES = (1, 2, 4, 8)
_SCHEDULES = ((None, 1), ("zero-bubble", 1), (None, 2), ("zbv", 2), (None, 4))
"""Schedules, None for the usual one, and stages of each rank."""
_RECOMPUTE: tuple[tuple[str | None, str | None, float], ...] = (
    (None, None, 0.0),
    ("selective", None, 0.0),
    ("full", "block", 0.25),
    ("full", "block", 0.5),
    ("full", "uniform", 1.0),
)
"""From the quickest to the smallest: granularity, method, and the share of a stage's layers."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits.

    Attributes:
        flags: of the layout; the other flags stay.
        case: the layout.
        missing: features that training lacks for it.
        needed: bytes of the fullest rank.
        speed: of a step.
    """

    flags: tuple[str, ...]
    case: Case
    missing: tuple[str, ...]
    needed: int
    speed: Speed


def search(request: Request, machine: Machine) -> list[Candidate]:
    """Layouts that fit, the quickest first. Settings of the layout that a flag gave stay as they are."""
    found = []
    for layout in _layouts(request, machine):
        for recompute in _recomputations(request, layout):
            candidate = _fitting(request, machine, {**layout, **recompute})
            if candidate is not None:  # more recomputation would only be slower
                found.append(candidate)
                break
    return sorted(found, key=lambda candidate: -candidate.speed.tokens_per_second)


def nearest(request: Request, machine: Machine, count: int = 3) -> list[Candidate]:
    """The layouts that fit and differ least from the one that was asked for.

    Sizes count by how often they are doubled or halved; recomputation, ZeRO stages and schedules count less.
    """
    kept = {name: value for name, value in request.layout.items() if name not in _SEARCHED}
    free = replace(request, layout=kept, given=request.given - _SEARCHED)
    asked = {**request.values, **_UNASKED, **request.layout}
    ranked = sorted(
        (_distance(asked, {**layout, **recompute}), number, layout, recompute)
        for number, (layout, recompute) in enumerate(_neighbours(free, machine))
    )
    found: dict[int, Candidate] = {}
    for _, _, layout, recompute in ranked:
        key = layout["tensor_model_parallel_size"] * request.world_size + layout["pipeline_model_parallel_size"]
        candidate = None if key in found else _fitting(free, machine, {**layout, **recompute})
        if candidate is not None:
            found[key] = candidate
        if len(found) == count:
            break
    return list(found.values())


_UNASKED: Mapping[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "moe_expert_parallel_size": 1,
    "sequence_parallel": False,
    "zero_stage": 0,
    "pipeline_schedule": None,
    "num_virtual_stages_per_pipeline_rank": None,
}
_RECOMPUTATION = (
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recomputation_layer_num"),
    *("checkpoint_in_cpu", "cpu_offloading_num_layers"),
)
_SEARCHED = frozenset((*_UNASKED, *pipeline.NAMES, *_RECOMPUTATION, "micro_batch_size"))


def _neighbours(request: Request, machine: Machine) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for layout in _layouts(request, machine):
        for recompute in _recomputations(request, layout):
            yield layout, recompute


def _distance(asked: Mapping[str, Any], offered: Mapping[str, Any]) -> float:
    """How much of what was asked for would have to change."""
    sizes = {"tensor_model_parallel_size": 1.0, "pipeline_model_parallel_size": 1.0, "micro_batch_size": 0.5}
    sizes["moe_expert_parallel_size"] = 0.5
    distance: float = sum(abs(math.log2(offered[name] / asked[name])) * weight for name, weight in sizes.items())
    distance += 0.5 * abs(_share(asked) - _share({**asked, **offered})) + 0.2 * abs(
        offered["zero_stage"] - asked["zero_stage"]
    )
    schedule = ("pipeline_schedule", "num_virtual_stages_per_pipeline_rank")
    distance += 0.3 * sum(asked[name] != offered.get(name) for name in schedule)
    return distance + (0.5 if asked["sequence_parallel"] and not offered["sequence_parallel"] else 0)


def _share(settings: Mapping[str, Any]) -> float:
    """How much is recomputed: 0 nothing, 0.1 attention, up to 1 all layers."""
    if settings["recompute_granularity"] != "full":
        return 0.1 if settings["recompute_granularity"] == "selective" else 0.0
    if settings["recompute_method"] != "block":
        return 1.0
    layers: float = settings["num_layers"] / settings["pipeline_model_parallel_size"]
    return min(1.0, float(settings["recompute_num_layers"]) / layers)


def _layouts(request: Request, machine: Machine) -> Iterator[dict[str, Any]]:
    """Every layout that the given flags leave open, recomputation aside."""
    given, world = request.layout, request.world_size
    sequence = given.get("context_parallel_size", 1) * given.get("ds_sequence_parallel_size", 1)
    assumed = "--micro-batch-size" in request.assumed
    micro = _MICRO_BATCHES if assumed else _open(given, "micro_batch_size", _MICRO_BATCHES)
    for tp in _open(given, "tensor_model_parallel_size", _powers(min(world, machine.ranks_per_node))):
        ranks = range(1, request.values["num_layers"] + 1)
        fitting = [size for size in ranks if world % (tp * sequence * size) == 0]
        for pp in _open(given, "pipeline_model_parallel_size", fitting):
            pipelines, stages = _pipelines(request, pp), _zero_stages(request, pp)
            shared = _open(given, "moe_expert_parallel_size", _expert_ranks(request, world // (tp * pp)))
            for cut, size, zero, ep in itertools.product(pipelines, micro, stages, shared):
                yield {
                    "tensor_model_parallel_size": tp,
                    "pipeline_model_parallel_size": pp,
                    "moe_expert_parallel_size": ep,
                    "sequence_parallel": given.get("sequence_parallel", tp > 1),
                    "micro_batch_size": size,
                    "zero_stage": zero,
                    **cut,
                }


def _expert_ranks(request: Request, plane: int) -> list[int]:
    """Numbers of the data- and context-parallel ranks `plane` that can share the experts of a layer."""
    (experts,) = set(request.values["num_experts"])
    return [size for size in range(1, experts + 1) if experts % size == plane % size == 0]


def _open(given: Mapping[str, Any], name: str, choices: Sequence[Any]) -> Sequence[Any]:
    return (given[name],) if name in given else choices


def _powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _pipelines(request: Request, pp: int) -> list[dict[str, Any]]:
    """Ways to cut the layers and to order the work, unless flags say how."""
    if pp == 1 or request.layout.keys() & set(pipeline.NAMES):
        return [{}]
    found = []
    for schedule, chunks in _SCHEDULES:
        # Where the layers cannot be shared equally, embedding and loss may count as a layer each.
        stages, layers = pp * chunks, request.values["num_layers"]
        for counted in (0, 1, 2):
            if (layers + counted) % stages == 0 and layers + counted > stages * (counted > 0):
                found.append(
                    {
                        "pipeline_schedule": schedule,
                        "num_virtual_stages_per_pipeline_rank": None if chunks == 1 else chunks,
                        "account_for_loss_in_pipeline_split": counted > 0,
                        "account_for_embedding_in_pipeline_split": counted > 1,
                    }
                )
                break
    return found


def _zero_stages(request: Request, pp: int) -> Sequence[int]:
    if "zero_stage" in request.layout:
        return (request.layout["zero_stage"],)
    if pp > 1:
        return (1,)
    return (1, 2, 3) if request.values["deepspeed"] else (1, 3)


def _recomputations(request: Request, layout: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What may be recomputed, the least first."""
    layers = request.values["num_layers"] // layout["pipeline_model_parallel_size"]
    if request.given & set(_RECOMPUTATION):
        yield {}
        return
    for granularity, method, share in _RECOMPUTE:
        count = max(1, round(share * layers)) if method == "block" else 1
        yield {
            "recompute_granularity": granularity,
            "recompute_method": method,
            "recompute_num_layers": count,
            "recomputation_layer_num": None,
            "checkpoint_in_cpu": False,
            "cpu_offloading_num_layers": 0,
        }


def _flags(request: Request, changes: Mapping[str, Any]) -> tuple[str, ...]:
    """The layout as flags; those that say what is so without them are left out."""
    start = defaults() | {"zero_stage": None}
    wanted = {**{name: value for name, value in request.layout.items() if name in _SEARCHED}, **changes}
    words = [all_options()[name].words(value) for name, value in wanted.items() if value != start[name]]
    return tuple(word for found in words for word in found)


def _fitting(request: Request, machine: Machine, changes: Mapping[str, Any]) -> Candidate | None:
    """The candidate with these settings, if it is possible and fits."""
    found = possible_case(request, machine, changes)
    if isinstance(found, Refused):
        return None
    case, resolved = found
    asked = "recompute_granularity" in request.given
    if case.recompute.granularity == "selective" and case.kernels.attention == "fused" and not asked:
        return None  # a fused kernel keeps nothing that this could drop
    needed = 0
    for place in range(case.pp):
        needed = max(needed, rank_memory(case, place).peak.total)
        if needed > machine.usable:
            return None
    return Candidate(
        flags=_flags(request, changes), case=case, missing=resolved.missing, needed=needed, speed=speed(case)
    )
