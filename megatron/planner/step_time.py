"""Estimated time of a training step: computation, what communication it does not hide, the bubble, the optimizer.

What overlaps, as `megatron.mpu.layers` and FSDP2 do it: in backward, the sum of the input's gradient runs beside the
products for the gradients of weights, and gathering the input beside those for its gradient; the reduction of one
layer's gradients beside the backward pass of the next; gathering its weights beside the forward pass of the one
before. In forward, tensor parallelism waits for every collective. Overlapping is taken to cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.planner import compute
from megatron.planner.case import Case
from megatron.planner.communication import (
    Operation,
    blocks_of,
    context_payloads,
    data_traffic,
    expert_payload,
    experts_again,
    head_payload,
    hidden_payload,
    link,
    seconds,
)
from megatron.planner.compute import Product, Seconds, moved, product_seconds
from megatron.planner.parameters import held_share, units_of
from megatron.planner.stages import idle_passes
from megatron.training.flops import TrainingFlops, training_flops

_OPTIMIZER_BYTES = 40
"""Moved per parameter and step: weight, gradient, two moments read; three written; norm and scaling of the gradient."""
_SGD_BYTES = 28
_GATHER_BYTES = 10
"""Moved per gathered parameter: cast of the float32 share, copy out of the gathered buffer."""
_SUM_BYTES = 18
"""Moved per parameter and micro-batch to add a 16-bit gradient to its float32 sum: cast, then read two, write one."""
_HOST_LINK, _HOST_MEMORY = 20e9, 20e9
"""Bytes per second between a rank and the host, and its share of the host's memory, for offloaded optimizers: of PCIe 4
x16 (25e9 measured by many) and of two CPUs per eight ranks (assumed)."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by what they are spent on; they add up to the step.

    The parts are those of the slowest pipeline rank; `bubble` is what it waits for the others.
    """

    matmul: float
    attention: float
    other: float
    """Norms, activations, rotations, additions, loss, and summing gradients over micro-batches."""
    recompute: float
    tensor: float
    """Tensor-parallel and context-parallel communication that is not hidden."""
    experts: float
    """Tokens on their way to experts and back, which nothing hides."""
    pipeline: float
    bubble: float
    data: float
    """Reduction of gradients and gathering of weights that are not hidden."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a step time means.

    Attributes:
        step: seconds by part.
        flops: operations of a sample.
        tokens_per_second: of one rank.
        mfu: model operations per second relative to the machine's peak.
        hfu: the same with recomputed operations.
        bubble: share of the step that ranks wait for the pipeline.
    """

    step: StepTime
    flops: TrainingFlops
    tokens_per_second: float
    mfu: float
    hfu: float
    bubble: float


def speed(case: Case) -> Speed:
    """Time, throughput and utilisation of a step."""
    step = step_time(case)
    ranks = case.topology.world_size
    plan = case.recompute
    again = plan.layers_again(case.stages.layers) if plan.granularity == "full" else None
    flops = training_flops(case.arch, case.seq_length, recompute=plan.granularity, recomputed_layers=again)
    peak = case.machine.fp32_peak if case.itemsize == 4 else case.machine.peak
    available = step.total * ranks * peak
    return Speed(
        step=step,
        flops=flops,
        tokens_per_second=case.step_tokens / step.total / ranks,
        mfu=flops.model * case.global_batch / available,
        hfu=flops.hardware * case.global_batch / available,
        bubble=step.bubble / step.total,
    )


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One micro-batch on one pipeline rank, all its stages."""

    forward: Seconds
    backward: Seconds
    again: Seconds
    tensor: float
    experts: float
    sent_forward: float
    """The part of both in the forward pass."""

    @property
    def forward_total(self) -> float:
        return self.forward.total + self.sent_forward

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.again.total + self.tensor + self.experts

    @property
    def backward_total(self) -> float:
        return self.total - self.forward_total


def step_time(case: Case) -> StepTime:
    """Seconds of a step."""
    passes = [_pass(case, rank) for rank in range(case.pp)]
    slowest = max(range(case.pp), key=lambda rank: passes[rank].total)
    worst, count = passes[slowest], case.microbatches
    mean = sum(found.total for found in passes) / case.pp
    idle = idle_passes(case.schedule, case.stages, count)
    data, optimizer = _data(case, slowest, worst)
    summing = _summing(case, slowest)
    compute_only = (worst.forward + worst.backward).times(count)
    return StepTime(
        matmul=compute_only.matmul,
        attention=compute_only.attention,
        other=compute_only.other + summing,
        recompute=worst.again.total * count,
        tensor=worst.tensor * count,
        experts=worst.experts * count,
        pipeline=_transfers(case) * count,
        bubble=idle * mean,
        data=data,
        optimizer=optimizer,
    )


def _pass(case: Case, pipeline_rank: int) -> _Pass:
    """Computation and tensor-parallel communication of one micro-batch on a pipeline rank."""
    stages = case.stages.stages_of(pipeline_rank)
    kinds = [kind for stage in stages for kind in case.layers_with_experts(stage)]
    forward = compute.sum_over(kinds, lambda experts: compute.layer_forward(case, experts=experts))
    backward = compute.sum_over(kinds, lambda experts: compute.layer_backward(case, experts=experts))
    again = Seconds()
    for stage in stages:
        again += compute.recomputed(case, stage)
    exposed_forward, exposed_backward = _layers_communication(case, stages)
    exchange = _exchange(case)
    exchanged = sum(kinds) * exchange
    if 0 in stages:
        ahead, back = compute.embedding_seconds(case)
        forward, backward = forward + ahead, backward + back
        exposed_forward += _one_result(case)
    if case.stages.last in stages:
        ahead, back = compute.head_seconds(case)
        forward, backward = forward + ahead, backward + back
        exposed_forward += _loss_sums(case) + (_gather(case) if case.sequence_parallel else 0.0)
    return _Pass(
        forward=forward,
        backward=backward,
        again=again,
        tensor=exposed_forward + exposed_backward,
        experts=2 * exchanged + sum(experts_again(case, stage) for stage in stages) * exchange,
        sent_forward=exposed_forward + exchanged,
    )


def _exchange(case: Case) -> float:
    """The way of a layer's tokens to experts and back."""
    return 2 * seconds(case, "experts", "all-to-all", expert_payload(case))


def _layers_communication(case: Case, stages: Sequence[int]) -> tuple[float, float]:
    """Communication of the layers of some stages that is not hidden, that of experts aside: forward and backward."""
    one = {experts: _layer_communication(case, experts=experts) for experts in (False, True)}
    forward = backward = 0.0
    for stage in stages:
        kinds = case.layers_with_experts(stage)
        forward += sum(one[kind][0] for kind in kinds)
        backward += sum(one[kind][1] for kind in kinds)
        spans = case.recompute.of_stage(stage).spans(len(kinds))
        backward += sum(one[kinds[number]][2] for span in spans if span.again for number in span.layers)
    return forward, backward


def _layer_communication(case: Case, *, experts: bool) -> tuple[float, float, float]:
    """Communication of a layer that is not hidden: forward, backward, and when it is recomputed."""
    context_forward, context_backward = _context(case)
    if case.tp == 1:
        return context_forward, context_backward, context_forward
    blocks, gather = blocks_of(case, experts=experts), _gather(case) if case.sequence_parallel else 0.0
    forward = blocks * (_one_result(case) + gather)
    again = forward - _one_result(case)
    backward = blocks * gather + 2 * seconds(case, "heads", "all-reduce", head_payload(case))
    for products in filter(None, compute.column_products(case, experts=experts)):
        backward += _hidden_behind(case, products)
    if experts:  # whose input's gradient is summed when it is complete
        backward += _one_result(case)
    return forward + context_forward, backward + context_backward, again + context_forward


def _hidden_behind(case: Case, products: tuple[Product, ...]) -> float:
    """What is left of a column-parallel layer's backward communication beside its products."""
    busy = sum(product_seconds(case, product, fp8=case.fp8) for product in products)
    left = max(0.0, _one_result(case) - busy)
    if case.sequence_parallel:
        left += max(0.0, _gather(case) - busy)
    return left


def _one_result(case: Case) -> float:
    """Sum of the partial results of a row-parallel layer."""
    operation: Operation = "reduce-scatter" if case.sequence_parallel else "all-reduce"
    return seconds(case, "tensor", operation, hidden_payload(case))


def _gather(case: Case) -> float:
    return seconds(case, "tensor", "all-gather", hidden_payload(case))


def _loss_sums(case: Case) -> float:
    return seconds(case, "tensor", "all-reduce", case.tokens * 4) + seconds(
        case, "tensor", "all-reduce", case.tokens * 8
    )


def _context(case: Case) -> tuple[float, float]:
    """Communication of a split sequence in one layer that attention does not hide: forward and backward."""
    if case.cp == 1:
        return 0.0, 0.0
    query, key = context_payloads(case)
    bandwidth, latency = link(case, "context")
    ring = case.cp // case.ulysses
    heads = 0.0
    if case.ulysses > 1:
        heads = 2 * latency + 2 * (query + key) * (case.ulysses - 1) / case.ulysses / bandwidth
    around = (ring - 1) * (latency + 2 * key / bandwidth)
    gradients = ring * (latency + 8 * key / case.itemsize / bandwidth) if ring > 1 else 0.0  # in float32
    forward, backward = compute.attention_seconds(case)
    return heads + max(0.0, around - forward), heads + max(0.0, around + gradients - backward)


def _transfers(case: Case) -> float:
    """Sending hidden states on and receiving their gradients, once per micro-batch and stage of a rank.

    Other micro-batches are computed meanwhile, so only the beginning of each transfer is waited for.
    """
    if case.pp == 1:
        return 0.0
    return 2 * case.stages.chunks * link(case, "pipeline")[1]


def _summing(case: Case, pipeline_rank: int) -> float:
    """Adding up gradients over micro-batches."""
    if case.microbatches == 1:
        return 0.0
    elements = sum(unit.elements for unit in units_of(case, pipeline_rank))
    size = _SUM_BYTES if case.itemsize == 2 else 12
    return moved(case.machine, size * elements) * case.microbatches


def _data(case: Case, pipeline_rank: int, one: _Pass) -> tuple[float, float]:
    """Data-parallel communication that is not hidden, and the optimizer's step."""
    units = units_of(case, pipeline_rank)
    largest = max((unit.elements for unit in units), default=0) / max(1, sum(unit.elements for unit in units))
    exposed, room = 0.0, dict[str, float]()
    for traffic in data_traffic(case, units):
        once = len(units) * seconds(case, traffic.axis, traffic.operation, traffic.payload / len(units))
        hidden = room.get(traffic.what, _room(case, traffic.what, one))
        room[traffic.what] = max(0.0, hidden - once)  # is left for the gradients (or weights) of experts
        # The first gathering and the last reduction have nothing to run beside.
        exposed += traffic.calls * max(once - hidden, once * largest)
    share = held_share(case, units)
    size = (_OPTIMIZER_BYTES if case.moments == 2 else _SGD_BYTES) * share
    step = moved(case.machine, size)
    if case.offload:
        step = 2 * case.itemsize * share / _HOST_LINK + size / _HOST_MEMORY
    gathered = sum(unit.elements for unit in units) if case.itemsize == 2 else 0
    return exposed, step + moved(case.machine, _GATHER_BYTES * gathered)


def _room(case: Case, what: str, one: _Pass) -> float:
    """Computation beside which a data-parallel collective runs."""
    if case.engine == "deepspeed" and case.zero_stage < 3:
        return 0.0
    if case.zero_stage == 3 and what == "weights":
        return one.total / 2
    return one.forward_total if what == "weights" else one.backward_total
