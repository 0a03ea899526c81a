"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.mpu.topology import Place
from megatron.planner.case import Case
from megatron.planner.communication import Traffic
from megatron.planner.machines import RESERVED, machine
from megatron.planner.memory import PARTS, RankMemory, worst_rank
from megatron.planner.parameters import build_rank
from megatron.planner.plan import Plan
from megatron.planner.published import PUBLISHED, UNFUSED, Comparison, compare, typical_error
from megatron.planner.request import Request
from megatron.planner.search import Candidate
from megatron.planner.step_time import speed

_GIB = 2**30
_WORTH_SAYING = 0.05
"""GiB below which a part of the memory is left out of an outline."""
_SHORT = {
    "weights": "weights",
    "master weights": "master",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations",
    "logits and loss": "loss",
    "working memory": "working",
}
_ATTENTION: Mapping[str, str] = {
    "masked": "attention keeps an explicit mask; kernels that need none (--op attention=flash_attn) do not",
    "weights": "attention keeps its weights; --recompute-granularity selective drops them, as do kernels that compute "
    "them again (--op attention=fused_sdpa_recompute on Gaudi)",
}
_SECONDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "other": "norms, activations, loss, sums",
    "recompute": "recomputation",
    "tensor": "tensor parallelism, not hidden",
    "experts": "tokens to experts and back",
    "pipeline": "transfers between stages",
    "bubble": "pipeline bubble",
    "data": "data parallelism, not hidden",
    "optimizer": "optimizer",
}


def table(align: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; `align` has one letter per column, l or r."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    lines = []
    for row in cells:
        pairs = zip(row, widths, align, strict=True)
        parts = [cell.ljust(width) if side == "l" else cell.rjust(width) for cell, width, side in pairs]
        lines.append("  " + "  ".join(parts).rstrip())
    return lines


def plan_lines(plan: Plan, request: Request, rank: int) -> list[str]:
    """The whole report of a plan."""
    return [
        *_heading(plan.case, request),
        *(f"training refuses this today: {problem}" for problem in plan.missing),
        "",
        *_memory_lines(plan),
        "",
        *_rank_lines(plan, rank),
        "",
        *_traffic_lines(plan, plan.case.topology.place(rank).pp),
        "",
        *_speed_lines(plan),
    ]


def outline(case: Case) -> list[str]:
    """The most important figures of a layout."""
    needed, found = worst_rank(case), speed(case)
    parts = {_SHORT[part]: size / _GIB for part, size in needed.peak.parts.items()}
    usable, total = case.machine.usable / _GIB, needed.peak.total / _GIB
    verdict = "fits" if total <= usable else "DOES NOT FIT"
    return [
        f"layout: {layout_text(case)}",
        f"memory: {verdict}, {total:.1f} of {usable:.1f} GiB on the fullest rank: "
        + ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size >= _WORTH_SAYING),
        f"time: {found.step.total:.3g} s for a step of {case.step_tokens / 1e6:.2f} M tokens, "
        f"{found.tokens_per_second:,.0f} tokens/s per rank, MFU {found.mfu:.0%}, pipeline bubble {found.bubble:.0%}",
    ]


def layout_text(case: Case) -> str:
    """The layout in a few words."""
    words = [f"TP {case.tp}" + (" SP" if case.sequence_parallel else "")]
    if case.cp > 1:
        ring = case.cp // case.ulysses
        words += [f"CP {ring}"] * (ring > 1) + [f"Ulysses {case.ulysses}"] * (case.ulysses > 1)
    words += [f"EP {case.ep}"] * (case.ep > 1)
    chunks = f" x {case.stages.chunks}" if case.stages.chunks > 1 else ""
    words += [f"PP {case.pp}{chunks}" + (f" {case.schedule}" if case.pp > 1 else ""), f"DP {case.dp}"]
    engine = "ZeRO" if case.engine == "deepspeed" else "stage"
    words += [f"{case.engine} {engine} {case.zero_stage}", f"micro-batch {case.micro_batch}"]
    return ", ".join([*words, _recompute_text(case)])


def _recompute_text(case: Case) -> str:
    plan, layers = case.recompute, case.recompute.num_layers
    parts = {"none": "no recomputation", "selective": "attention recomputed", "mlp": "feed-forward blocks recomputed"}
    if plan.granularity != "full":
        return parts[plan.granularity] + (f", {plan.host_layers} layers on the host" if plan.host_layers else "")
    if isinstance(layers, tuple):
        text = f"{' '.join(map(str, layers))} layers of the stages recomputed"
    elif plan.method == "block":
        text = f"{layers} layer{'s' if layers > 1 else ''} of each stage recomputed"
    else:
        text = "all layers recomputed" + (f" by {layers}" if layers > 1 else "")
    return text + (", their inputs on the host" if plan.host_inputs else "")


def _heading(case: Case, request: Request) -> list[str]:
    arch = case.arch
    dtype = {4: "float32", 2: "16-bit"}[case.itemsize]
    name = request.values["preset"] or "model"
    lines = [
        f"{name}: {arch.num_parameters() / 1e9:.2f} B parameters, {arch.num_layers} layers, {dtype}",
        f"{case.topology.world_size} ranks: {case.machine.description}",
        f"layout: {layout_text(case)}",
        f"batch: {case.global_batch} x {case.seq_length} = {case.step_tokens / 1e6:.2f} M tokens; "
        f"{case.microbatches} micro-batches per rank and step",
    ]
    if len(set(case.stages.layers)) > 1:
        lines.append(f"layers of the stages: {' '.join(map(str, case.stages.layers))}")
    lines += _experts_text(case)
    if request.assumed:
        lines.append(f"assumed: {' '.join(request.assumed)}")
    if case.itemsize == 4:
        lines.append("float32 because neither --bf16 nor --fp16 was given")
    if case.kernels.attention in _ATTENTION and case.recompute.granularity == "none":
        lines.append(_ATTENTION[case.kernels.attention])
    return lines


def _experts_text(case: Case) -> list[str]:
    experts = case.arch.experts
    if experts is None:
        return []
    active = case.arch.num_parameters(active=True) / 1e9
    return [
        f"experts: {experts.count // case.ep} of {experts.count} on a rank in {len(experts.layers)} layers, "
        f"{experts.topk} for a token, {active:.2f} B parameters active",
        f"assumed: all experts get equally many tokens, {case.expert_rows} rows of a micro-batch and layer on a rank; "
        "ranks whose experts get more need more memory and time",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    memory, usable = plan.case.machine.memory, plan.case.machine.usable
    rows = []
    for places, found in _grouped(plan.memory):
        parts = found.peak.parts
        cells = [f"{parts.get(part, 0) / _GIB:.2f}" for part in PARTS]
        total = f"{found.peak.total / _GIB:.2f}"
        rows.append([places, f"{found.parameters / 1e6:.0f}", *cells, total, found.peak.name])
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    free = usable - plan.needed
    spare = f"{abs(free) / _GIB:.1f} GiB " + ("to spare" if free >= 0 else "too much")
    modes = ", ".join(f"{name} {found.peak.total / _GIB:.1f}" for name, found in plan.by_recompute.items())
    return [
        "memory of a rank at its peak, GiB:",
        *table("l" + "r" * (len(PARTS) + 2) + "l", ["stage", "M params", *_SHORT.values(), "total", "peak"], rows),
        f"{verdict}: {plan.needed / _GIB:.1f} of {usable / _GIB:.1f} GiB, {spare} "
        f"({memory / _GIB:.1f} GiB, less {RESERVED:.0%} for driver, communicators and gaps)",
        f"with other recomputation, GiB: {modes}",
    ]


def _grouped(memory: Sequence[RankMemory]) -> list[tuple[str, RankMemory]]:
    """Neighbouring places of the pipeline that need the same, as one."""
    groups: list[list[RankMemory]] = []
    for found in memory:
        if groups and groups[-1][-1].moments == found.moments:
            groups[-1].append(found)
        else:
            groups.append([found])
    return [
        (str(group[0].pipeline_rank) + (f"-{group[-1].pipeline_rank}" if len(group) > 1 else ""), group[0])
        for group in groups
    ]


def _rank_lines(plan: Plan, rank: int) -> list[str]:
    """What one rank holds, from its model on the meta device."""
    case = plan.case
    place = case.topology.place(rank)
    models = build_rank(case, rank)
    count = sum(weight.numel() for model in models for weight in model.parameters())
    layers = [f"{min(map(int, model.layers))}-{max(map(int, model.layers))}" for model in models if len(model.layers)]
    parts = ["embedding"] * (0 in case.stages.stages_of(place.pp))
    parts += [f"layers {', '.join(layers)}"] if layers else []
    parts += ["final norm and head"] * (case.stages.last in case.stages.stages_of(place.pp))
    return [f"rank {rank} ({_place_text(place)}): {count:,} parameters: {', '.join(parts)}"]


def _place_text(place: Place) -> str:
    return ", ".join(f"{axis} {at}" for axis, at in vars(place).items())


def _traffic_lines(plan: Plan, pipeline_rank: int) -> list[str]:
    rows = [_traffic_row(traffic) for traffic in plan.traffic[pipeline_rank]]
    if not rows:
        return ["sent: nothing"]
    header = ["axis", "operation", "what", "ranks", "MB each", "calls", "GB sent"]
    return [f"sent in a step by a rank of stage {pipeline_rank}:", *table("lllrrrr", header, rows)]


def _traffic_row(traffic: Traffic) -> list[str]:
    return [
        *(traffic.axis, traffic.operation, traffic.what, str(traffic.ranks)),
        *(_amount(traffic.payload / 1e6), f"{traffic.calls:,.0f}", _amount(traffic.sent / 1e9)),
    ]


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speed_lines(plan: Plan) -> list[str]:
    found, case = plan.speed, plan.case
    parts = {name: value for name, value in vars(found.step).items() if value >= 0.0005 * found.step.total}
    rows = [[_SECONDS[name], f"{value:.3f}", f"{value / found.step.total:.1%}"] for name, value in parts.items()]
    rows.append(["step", f"{found.step.total:.3f}", ""])
    model = found.flops.model * case.global_batch
    again = found.flops.recompute * case.global_batch
    return [
        "estimated time of a step, seconds:",
        *table("lrr", ["", "s", ""], rows),
        f"{found.tokens_per_second:,.0f} tokens/s per rank, "
        f"{found.tokens_per_second * case.topology.world_size:,.0f} in all",
        f"{model:.3g} FLOPs per step"
        + (f" and {again:.3g} recomputed" if again else "")
        + f"; MFU {found.mfu:.1%}, HFU {found.hfu:.1%} of {case.machine.peak / 1e12:.4g} TFLOP/s; "
        f"pipeline bubble {found.bubble:.1%}",
        _experience(plan),
    ]


def _experience(plan: Plan) -> str:
    """How published runs on this machine compare with estimates like this one."""
    name = plan.case.machine.name
    rows = [row for row in PUBLISHED if row.machine == name]
    alike = [row for row in rows if not row.fp8 and UNFUSED not in row.flags] or rows
    if not alike:
        return f"no published run on {name} is known to hold this against"
    shares = sorted(1.0 / (1.0 + one.error) for one in compare(alike))
    middle = statistics.median(shares)
    runs = f"{len(shares)} published runs on {name} reach {shares[0]:.0%} to {shares[-1]:.0%}"
    if len(shares) == 1:
        runs = f"the published run on {name} reaches {middle:.0%}"
    speed = f"{middle * plan.speed.tokens_per_second:,.0f} tokens/s per rank"
    return f"{runs} of such an estimate; with the median of {middle:.0%} this one is {speed} (--compare-published)"


def search_lines(found: Sequence[Candidate], count: int) -> list[str]:
    """The best layouts."""
    rows = [
        [
            str(number),
            f"{one.speed.tokens_per_second:,.0f}",
            f"{one.speed.step.total:.2f}",
            f"{one.speed.mfu:.1%}",
            f"{one.speed.bubble:.1%}",
            f"{one.needed / _GIB:.1f}",
            ("* " if one.missing else "") + layout_text(one.case),
        ]
        for number, one in enumerate(found[:count], start=1)
    ]
    header = ["", "tokens/s/rank", "step s", "MFU", "bubble", "GiB", "layout"]
    lines = table("rrrrrrl", header, rows)
    if any(one.missing for one in found[:count]):
        lines.append("* training refuses this today")
    return lines


def flag_lines(found: Sequence[Candidate]) -> list[str]:
    """The flags of layouts, to copy."""
    return ["", *(f"flags of {number}: {' '.join(one.flags)}" for number, one in enumerate(found, start=1))]


def comparison_lines(found: Sequence[Comparison]) -> list[str]:
    """Published results beside their estimates."""
    rows = [
        [
            *(one.row.machine, str(one.row.ranks), one.row.system, one.row.model),
            *(f"{one.row.tokens_per_second:,.0f}", f"{one.estimate:,.0f}", f"{one.error:+.0%}"),
            *(f"{one.needed / _GIB:.0f} of {machine(one.row.machine).usable / _GIB:.0f}", one.row.remark),
        ]
        for one in found
    ]
    header = ["machine", "ranks", "who", "what", "published", "estimate", "error", "GiB", "remark"]
    median, size = typical_error(found)
    return [
        "tokens per second and rank, and the memory that this project would need for the same run:",
        *table("lrllrrrrl", header, rows),
        f"{len(found)} rows: median error {median:+.0%}, median size of an error {size:.0%}",
    ]


def as_json(plan: Plan, rank: int) -> dict[str, Any]:
    """Everything in a plan, as JSON."""
    case = plan.case
    return {
        "architecture": dataclasses.asdict(case.arch),
        "machine": case.machine.name,
        "layout": _layout_json(case),
        "training_refuses": list(plan.missing),
        "fits": plan.fits,
        "needed_bytes": plan.needed,
        "usable_bytes": case.machine.usable,
        "bytes_by_recompute": {name: found.peak.total for name, found in plan.by_recompute.items()},
        "memory": [_memory_json(found) for found in plan.memory],
        "rank": {"rank": rank, **vars(case.topology.place(rank))},
        "traffic": [vars(traffic) | {"sent": traffic.sent} for traffic in plan.traffic[case.topology.place(rank).pp]],
        "speed": _speed_json(plan),
    }


def _layout_json(case: Case) -> dict[str, Any]:
    return {
        "world_size": case.topology.world_size,
        "tp": case.tp,
        "cp": case.cp // case.ulysses,
        "ulysses": case.ulysses,
        "pp": case.pp,
        "ep": case.ep,
        "dp": case.dp,
        "stages": list(case.stages.layers),
        "schedule": case.schedule,
        "sequence_parallel": case.sequence_parallel,
        "engine": case.engine,
        "zero_stage": case.zero_stage,
        "micro_batch": case.micro_batch,
        "global_batch": case.global_batch,
        "seq_length": case.seq_length,
        "recompute": dataclasses.asdict(case.recompute),
    }


def _memory_json(found: RankMemory) -> dict[str, Any]:
    return {
        "stage": found.pipeline_rank,
        "parameters": found.parameters,
        "micro_batches_held": found.in_flight,
        "peak": found.peak.name,
        "peak_bytes": found.peak.total,
        "moments": {moment.name: dict(moment.parts) for moment in found.moments},
    }


def _speed_json(plan: Plan) -> dict[str, Any]:
    found = plan.speed
    return {
        "step_seconds": found.step.total,
        "seconds": vars(found.step),
        "flops_per_step": found.flops.model * plan.case.global_batch,
        "recomputed_flops_per_step": found.flops.recompute * plan.case.global_batch,
        "tokens_per_second_per_rank": found.tokens_per_second,
        "mfu": found.mfu,
        "hfu": found.hfu,
        "bubble": found.bubble,
    }


def candidate_json(one: Candidate) -> dict[str, Any]:
    """A layout that was found, as JSON."""
    return {
        "layout": _layout_json(one.case),
        "flags": list(one.flags),
        "training_refuses": list(one.missing),
        "needed_bytes": one.needed,
        "step_seconds": one.speed.step.total,
        "tokens_per_second_per_rank": one.speed.tokens_per_second,
        "mfu": one.speed.mfu,
    }


def comparison_json(found: Sequence[Comparison]) -> list[Mapping[str, Any]]:
    """Published results and estimates, as JSON."""
    return [{**dataclasses.asdict(one.row), "estimate": one.estimate, "error": one.error} for one in found]
