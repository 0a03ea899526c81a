"""What a rank sends in one training step, collective by collective.

Tests trace the real model and engine and find the same collectives. Payloads are bytes of the whole tensor that a
collective is about: the input of an all-reduce, the joined result of an all-gather. In a ring of k ranks each rank
sends (k-1)/k of it, or twice that in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron.mpu.ulysses import copies_of_kv_heads
from megatron.planner import activations
from megatron.planner.case import Case
from megatron.planner.machines import LINK_EFFICIENCY
from megatron.planner.parameters import Unit, held_share, units_of

Axis = Literal["tensor", "heads", "context", "data", "copies", "experts", "expert data", "expert copies", "pipeline"]
"""Whom a rank talks to. "heads" are tensor-parallel ranks with copies of one key-value head, "data" the ranks that
share one copy of the training state, "copies" those that hold the same part of it. "experts" are ranks that share the
experts of a layer; "expert data" and "expert copies" are to their training state what "data" and "copies" are to the
rest."""
Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"]
Call = tuple[Operation, str, int, int]
"""Operation, what is sent, bytes of each, number in a micro-batch (or in a step, for the training state)."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind in one step.

    Attributes:
        axis: the ranks that take part.
        operation: the collective.
        what: what is sent.
        payload: bytes of each.
        calls: how many there are per step, over all micro-batches.
        ranks: members of the group.
    """

    axis: Axis
    operation: Operation
    what: str
    payload: int
    calls: float
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in a step."""
        return self.calls * sent_once(self.operation, self.payload, self.ranks)


def sent_once(operation: Operation, payload: float, ranks: int) -> float:
    """Bytes that one of `ranks` ranks sends in one collective."""
    if operation == "send":
        return payload
    return payload * (ranks - 1) / ranks * (2 if operation == "all-reduce" else 1)


def step_traffic(case: Case, pipeline_rank: int) -> tuple[Traffic, ...]:
    """Everything that a rank at one place of the pipeline sends in a step."""
    found = (
        *_tensor(case, pipeline_rank),
        *_heads(case, pipeline_rank),
        *_context(case, pipeline_rank),
        *_experts(case, pipeline_rank),
        *data_traffic(case, units_of(case, pipeline_rank)),
        *_pipeline(case, pipeline_rank),
    )
    return tuple(traffic for traffic in found if traffic.ranks > 1 and traffic.calls > 0)


def seconds(case: Case, axis: Axis, operation: Operation, payload: float) -> float:
    """Time of one collective over an axis."""
    ranks, _ = _ring(case, axis)
    if ranks == 1 or payload == 0:
        return 0.0
    bandwidth, latency = link(case, axis)
    if operation == "all-to-all":
        return latency + _exchange_seconds(case, axis, payload)
    return latency + sent_once(operation, payload, ranks) / bandwidth


def _exchange_seconds(case: Case, axis: Axis, payload: float) -> float:
    """Time of an all-to-all without latency: to ranks of other nodes, every rank sends over its own link alone."""
    ranks, stride = _ring(case, axis)
    near = min(ranks, max(1, case.machine.ranks_per_node // stride))
    inside, between = (near - 1) / case.machine.inside, (ranks - near) / case.machine.between
    return payload / ranks * max(inside, between) / LINK_EFFICIENCY


def link(case: Case, axis: Axis) -> tuple[float, float]:
    """Bytes per second that a rank sends at in collectives over an axis, and their latency in seconds.

    Ranks of a group that share a node use all their links to other nodes for the group's ring, which goes round all
    nodes once.
    """
    machine = case.machine
    ranks, stride = _ring(case, axis)
    in_node = max(1, machine.ranks_per_node // stride)
    if ranks <= in_node:
        return machine.inside * LINK_EFFICIENCY, machine.latency
    if axis == "pipeline":
        return machine.between * LINK_EFFICIENCY, 2 * machine.latency
    nodes = ranks / in_node
    bandwidth = min(machine.inside, in_node * machine.between) * LINK_EFFICIENCY
    return bandwidth, 2 * machine.latency + machine.hop * nodes


def _ring(case: Case, axis: Axis) -> tuple[int, int]:
    """Ranks of a group along an axis, and how far apart they are numbered."""
    shards, expert_shards, apart = case.shards, case.shards_of(experts=True), case.tp * case.ep
    return {
        "tensor": (case.tp, 1),
        "heads": (case.kv_copies, 1),
        "context": (case.cp, case.tp),
        "data": (shards, case.tp),
        "copies": (case.data_ranks // shards, case.tp * shards),
        "experts": (case.ep, case.tp),
        "expert data": (expert_shards, apart),
        "expert copies": (case.holders(experts=True) // expert_shards, apart * expert_shards),
        "pipeline": (case.pp, case.topology.world_size // case.pp),
    }[axis]


def hidden_payload(case: Case) -> int:
    """Hidden states of all tokens of a micro-batch in the model's dtype: what tensor parallelism sends."""
    return case.tokens * case.arch.hidden_size * case.itemsize


def _tensor(case: Case, pipeline_rank: int) -> Sequence[Traffic]:
    """Tensor and sequence parallelism (arXiv:1909.08053, arXiv:2205.05198)."""
    stages = case.stages.stages_of(pipeline_rank)
    kinds = _kinds(case, stages)
    first, last = int(0 in stages), int(case.stages.last in stages)
    blocks = sum(blocks_of(case, experts=kind) for kind in kinds)
    inputs, results = blocks + last, blocks + first
    inputs_again, results_again = _again(case, stages)
    hidden = hidden_payload(case)
    if case.sequence_parallel:
        calls: list[Call] = [
            ("all-gather", "inputs of layers", hidden, inputs + inputs_again),
            ("reduce-scatter", "results of layers", hidden, results + results_again),
            ("all-gather", "gradients of results", hidden, results),
            ("all-gather", "inputs of layers, for the gradients of weights", hidden, inputs - sum(kinds)),
            ("reduce-scatter", "gradients of inputs", hidden, inputs),
        ]
    else:
        calls = [
            ("all-reduce", "results of layers", hidden, results + results_again),
            ("all-reduce", "gradients of inputs", hidden, inputs),
        ]
    calls += _replicated(case, kinds, first, last)
    calls += [
        ("all-reduce", "loss: largest logit", case.tokens * 4, last),
        ("all-reduce", "loss: sums", case.tokens * 8, last),
    ]
    return [
        Traffic(
            axis="tensor",
            operation=operation,
            what=what,
            payload=payload,
            calls=number * case.microbatches,
            ranks=case.tp,
        )
        for operation, what, payload, number in calls
    ]


def _again(case: Case, stages: Sequence[int]) -> tuple[int, int]:
    """Inputs gathered and results summed once more by recomputation, which stops before the group's last sum."""
    inputs = results = 0
    for stage in stages:
        kinds = case.layers_with_experts(stage)
        spans = [span for span in case.recompute.of_stage(stage).spans(len(kinds)) if span.again]
        run = sum(blocks_of(case, experts=kinds[number]) for span in spans for number in span.layers)
        inputs, results = inputs + run, results + run - len(spans)
        if case.recompute.granularity == "mlp":
            blocks = sum(blocks_of(case, experts=kind) - 1 for kind in kinds)
            inputs, results = inputs + blocks, results + blocks - len(kinds)
    return (inputs if case.sequence_parallel else 0), results


def _kinds(case: Case, stages: Sequence[int]) -> list[bool]:
    """Whether each layer of some stages has experts."""
    return [kind for stage in stages for kind in case.layers_with_experts(stage)]


def blocks_of(case: Case, *, experts: bool) -> int:
    """Blocks of a layer whose inputs are gathered and whose results are summed: a block beside experts is a third."""
    return 3 if experts and activations.dense_width(case, experts=True) else 2


def _replicated(case: Case, kinds: Sequence[bool], first: int, last: int) -> list[Call]:
    """Gradients of parameters that all tensor-parallel ranks hold but use for some tokens or heads only."""
    arch, layers = case.arch, len(kinds)
    calls: list[Call] = []
    weights = 2 if arch.norm == "layernorm" else 1
    if arch.qk_norm:
        heads = arch.head_dim * case.itemsize
        calls.append(("all-reduce", "gradients of query and key norms", heads, 2 * layers))
    if case.sequence_parallel:
        norms = 2 * layers + last + (first if arch.embedding_norm else 0)
        blocks = sum(blocks_of(case, experts=kind) - kind for kind in kinds)
        biases = blocks if arch.linear_bias else 0
        vector = arch.hidden_size * case.itemsize
        calls.append(("all-reduce", "gradients of norms and biases", vector, weights * norms + biases))
        if arch.position == "learned":
            calls.append(("all-reduce", "gradient of positions", arch.max_positions * vector, first))
    if arch.experts is not None:
        width = arch.hidden_size * case.itemsize
        calls.append(("all-reduce", "gradients of routers", arch.experts.count * width, sum(kinds)))
        if arch.linear_bias:
            calls.append(("all-reduce", "gradients of biases", arch.experts.count // case.ep * width, sum(kinds)))
    return calls


def _experts(case: Case, pipeline_rank: int) -> Sequence[Traffic]:
    """Tokens travel to the ranks of their experts and back; router losses look at all of a sequence."""
    experts, stages = case.arch.experts, case.stages.stages_of(pipeline_rank)
    if experts is None:
        return []
    forward = layers_with_experts = sum(_kinds(case, stages))
    for stage in stages:
        forward += experts_again(case, stage)
    routing, samples = case.routing, case.micro_batch if case.routing.balancing == "seq_aux_loss" else 1
    padded = routing.bins is not None or (routing.train_capacity_factor is not None and routing.pad)
    calls: list[tuple[Axis, Operation, str, int, int]] = [
        ("experts", "all-to-all", "tokens to experts and back", expert_payload(case), 2 * forward),
        ("experts", "all-to-all", "their gradients", expert_payload(case), 2 * layers_with_experts),
        ("experts", "all-to-all", "numbers of tokens", 8 * experts.count, 0 if padded else forward),
        ("experts", "all-reduce", "most tokens of an expert", 8, forward if routing.bins is not None else 0),
        ("context", "all-reduce", "choices of routers", 4 * experts.count * samples, forward),
    ]
    return [
        Traffic(
            axis=axis,
            operation=operation,
            what=what,
            payload=payload,
            calls=number * case.microbatches,
            ranks=_ring(case, axis)[0],
        )
        for axis, operation, what, payload, number in calls
    ]


def expert_payload(case: Case) -> int:
    """Rows that a rank sends to experts, when all experts get equally many."""
    return case.expert_rows * case.arch.hidden_size * case.itemsize


def experts_again(case: Case, stage: int) -> int:
    """Layers of a stage whose experts are computed again in the backward pass."""
    kinds = case.layers_with_experts(stage)
    if case.recompute.granularity == "mlp":
        return sum(kinds)
    spans = case.recompute.of_stage(stage).spans(len(kinds))
    return sum(kinds[number] for span in spans if span.again for number in span.layers)


def _heads(case: Case, pipeline_rank: int) -> Sequence[Traffic]:
    """Copies of a key-value head sum the gradients of its weights and biases."""
    layers = sum(case.stages.layers[stage] for stage in case.stages.stages_of(pipeline_rank))
    rows = {"weights": case.arch.hidden_size, "biases": 1 if case.arch.linear_bias or case.arch.qkv_bias else 0}
    return [
        Traffic(
            axis="heads",
            operation="all-reduce",
            what=f"gradients of key and value {what}",
            payload=head_payload(case) // case.arch.hidden_size * columns,
            calls=2 * layers * case.microbatches if columns else 0,
            ranks=case.kv_copies,
        )
        for what, columns in rows.items()
    ]


def head_payload(case: Case) -> int:
    """The key (or value) weight of one rank in the model's dtype."""
    return case.kv_heads * case.arch.head_dim * case.arch.hidden_size * case.itemsize


def _context(case: Case, pipeline_rank: int) -> Sequence[Traffic]:
    """Sequences split over ranks: heads change owners (Ulysses), keys and values go round (ring)."""
    stages = case.stages.stages_of(pipeline_rank)
    layers = sum(case.stages.layers[stage] for stage in stages)
    again = _attention_again(case, stages)
    query, key = context_payloads(case)
    ring = case.cp // case.ulysses
    # Recomputation of attention alone stops before its results are exchanged.
    results = 2 * layers + (again if case.recompute.granularity == "full" else 0)
    calls: list[tuple[Operation, str, int, int, int]] = [
        ("all-to-all", "queries, keys and values", query + 2 * key, 2 * layers + again, case.ulysses),
        ("all-to-all", "results of attention", query, results, case.ulysses),
        ("send", "keys and values", 2 * key, (ring - 1) * (2 * layers + again), ring),
        ("send", "gradients of keys and values", 2 * key // case.itemsize * 4, ring * layers, ring),
    ]
    return [
        Traffic(
            axis="context",
            operation=operation,
            what=what,
            payload=payload,
            calls=number * case.microbatches,
            ranks=ranks,
        )
        for operation, what, payload, number, ranks in calls
    ]


def context_payloads(case: Case) -> tuple[int, int]:
    """Queries, and keys, of one rank as they are exchanged: with the copies of heads that several ranks need."""
    copies = copies_of_kv_heads(case.kv_heads, case.ulysses)
    width = case.tokens * case.arch.head_dim * case.itemsize
    return width * (case.arch.num_heads // case.tp), width * case.kv_heads * copies


def _attention_again(case: Case, stages: Sequence[int]) -> int:
    """Layers whose attention is computed again in the backward pass."""
    plan, layers = case.recompute, case.stages.layers
    if plan.granularity == "selective":
        return sum(layers[stage] for stage in stages)
    return sum(plan.of_stage(stage).layers_again([layers[stage]]) for stage in stages)


def data_traffic(case: Case, units: Sequence[Unit]) -> list[Traffic]:
    """What data parallelism sends: weights are gathered, gradients reduced, over shards and over copies."""
    found = []
    for experts in (False, True):
        shards = case.shards_of(experts=experts)
        padded = held_share(case, [unit for unit in units if unit.experts == experts]) * shards
        calls = _deepspeed(case, padded) if case.engine == "deepspeed" else _native(case, padded, shards)
        found += [_state(case, *call, experts=experts) for call in calls if padded]
    return found


def _state(case: Case, operation: Operation, what: str, payload: int, calls: int, *, experts: bool) -> Traffic:
    axis: Axis = "expert data" if experts else "data"
    if what == "gradients of copies":
        axis = "expert copies" if experts else "copies"
    ranks, _ = _ring(case, axis)
    return Traffic(axis=axis, operation=operation, what=what, payload=payload, calls=calls, ranks=ranks)


def _native(case: Case, elements: int, shards: int) -> list[Call]:
    weights, gradients, count = case.itemsize * elements, case.grad_itemsize * elements, case.microbatches
    every = count if case.zero_stage >= 2 else 1
    gathers = 2 * count if case.zero_stage == 3 else 1
    return [
        ("all-gather", "weights", weights, gathers),
        ("reduce-scatter", "gradients", gradients, every),
        ("all-reduce", "gradients of copies", gradients // shards, every),
    ]


def _deepspeed(case: Case, elements: int) -> list[Call]:
    weights, count = case.itemsize * elements, case.microbatches
    if case.zero_stage == 0:
        return [("all-reduce", "gradients", 4 * elements, 1)]
    if case.zero_stage == 1:
        summed = case.grad_itemsize if case.itemsize == 2 else 4
        return [("all-reduce", "gradients", summed * elements, 1), ("all-gather", "weights", weights, 1)]
    gradients = case.grad_itemsize * elements
    if case.zero_stage == 2:
        return [("reduce-scatter", "gradients", gradients, count), ("all-gather", "weights", weights, 1)]
    return [("all-gather", "weights", weights, 2 * count), ("reduce-scatter", "gradients", gradients, count)]


def _pipeline(case: Case, pipeline_rank: int) -> Sequence[Traffic]:
    """Hidden states to the next stage, their gradients to the one before, and the gradient of a shared embedding."""
    layout = case.stages
    stages = layout.stages_of(pipeline_rank)
    forward = sum(stage < layout.last and layout.rank_of(stage + 1) != pipeline_rank for stage in stages)
    backward = sum(stage > 0 and layout.rank_of(stage - 1) != pipeline_rank for stage in stages)
    hidden = activations.hidden_bytes(case)
    found = [
        Traffic(
            axis="pipeline",
            operation="send",
            what=what,
            payload=hidden,
            calls=number * case.microbatches,
            ranks=case.pp,
        )
        for what, number in (("hidden states", forward), ("gradients of hidden states", backward))
    ]
    ends = (layout.rank_of(0), layout.rank_of(layout.last))
    if case.arch.tied_embeddings and ends[0] != ends[1] and pipeline_rank in ends:
        what = "shared embedding" if pipeline_rank == ends[0] else "gradient of the shared embedding"
        table = case.arch.hidden_size * -(-(case.arch.padded_vocab_size // case.tp) // case.shards)
        found.append(Traffic(axis="pipeline", operation="send", what=what, payload=4 * table, calls=1, ranks=case.pp))
    return found
