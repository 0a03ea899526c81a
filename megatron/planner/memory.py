"""Memory of a rank: what the engines keep per parameter, and the moments of a step at which most is held.

N parameters on the rank, e bytes in the forward pass, g bytes per summed gradient, d ranks that share the training
state: for experts that ranks share, those that hold the same ones. The native engine (FSDP2) keeps float32 master
weights and moments of its share; see `megatron.training.native`:

| stage | weights             | gradients over micro-batches | master, moments |
|-------|---------------------|------------------------------|-----------------|
| 0     | e N                 | g N, then 4 N                | 4 N, 8 N        |
| 1     | e N                 | g N, then 4 N / d            | 4 N/d, 8 N/d    |
| 2     | e N                 | 4 N / d                      | 4 N/d, 8 N/d    |
| 3     | e of two layers     | 4 N / d                      | 4 N/d, 8 N/d    |

One data-parallel rank in float32 has no second copy of its weights: 4 N, 4 N, 8 N.

The 8-bit forms of weights, where they are kept (`--cache-fp8-weight`), take a byte for each number of the layers'
linear maps, at every stage whole. A cast to 8 bits goes through two float32 copies of its argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.mpu.schedule import splits_backward
from megatron.ops.linear_cross_entropy import BLOCK_ELEMENTS, VOCABULARY_PARTS
from megatron.planner import activations
from megatron.planner.case import Case
from megatron.planner.compute import Product, column_products, row_products
from megatron.planner.parameters import Unit, held_share, shards_of, units_of
from megatron.planner.stages import Held, held_at_once

PARTS = ("weights", "master weights", "optimizer", "gradients", "activations", "logits and loss", "working memory")
_CHUNK_TP = 2**24
_CHUNK = 2**26
"""Logits of which the losses make float32 copies at a time, with and without tensor parallelism."""


@dataclass(frozen=True)
class Moment:
    """What is held at one moment of a step.

    Attributes:
        name: the moment.
        parts: bytes of each of `PARTS`.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of the ranks at one place of the pipeline."""

    pipeline_rank: int
    parameters: int
    """Parameters held by a tensor-parallel rank."""
    moments: tuple[Moment, ...]
    in_flight: float
    """Micro-batches whose activations are held at once."""

    @property
    def peak(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)


def rank_memory(case: Case, pipeline_rank: int) -> RankMemory:
    """Memory of the ranks at one place of the pipeline."""
    units = units_of(case, pipeline_rank)
    state = _deepspeed(case, units) if case.engine == "deepspeed" else _native(case, units)
    holding = held_at_once(case.schedule, case.stages, case.microbatches)[pipeline_rank]
    held, reducing = (_bytes_held(case, pipeline_rank, sets) for sets in holding)
    stages = case.stages.stages_of(pipeline_rank)
    has_loss = case.stages.last in stages
    layer = max(activations.returned_bytes(case, stage) for stage in stages) + _backward_of_a_layer(case)
    layer += _casting(case)
    if splits_backward(case.schedule):  # deferred gradients of a whole stage are computed at once
        layer += case.itemsize * sum(unit.elements for unit in units) // case.stages.chunks
    early = layer + (state.reduction if state.reduces_often else 0)
    moments = [
        Moment("backward of a layer", state.running | {"activations": held, "working memory": early}),
        Moment("last backward", state.running | {"activations": reducing, "working memory": layer + state.reduction}),
        Moment("end of backward", state.finishing),
        Moment("optimizer step", state.updating),
    ]
    if has_loss:
        logits, more = _logits_and_loss(case)
        moments.append(Moment("loss", state.running | {"activations": held - logits, "logits and loss": logits + more}))
    eight_bit = _kept_forms(case, stages)
    if eight_bit:
        moments = [Moment(at.name, {**at.parts, "weights": at.parts.get("weights", 0) + eight_bit}) for at in moments]
    return RankMemory(
        pipeline_rank=pipeline_rank,
        parameters=sum(unit.elements for unit in units),
        moments=tuple(moments),
        in_flight=(held - _batches(case)) / sum(stage_activations(case, stage) for stage in stages),
    )


def worst_rank(case: Case) -> RankMemory:
    """The place of the pipeline that needs most."""
    return max((rank_memory(case, rank) for rank in range(case.pp)), key=lambda found: found.peak.total)


@dataclass(frozen=True, kw_only=True)
class _State:
    """Bytes by part: while micro-batches run, when the last one ends, and in the optimizer's step."""

    running: dict[str, int]
    finishing: dict[str, int]
    updating: dict[str, int]
    reduction: int
    """Buffers of a gradient reduction beside the backward pass."""
    reduces_often: bool = True
    """After every micro-batch, not after the last one only."""


def _native(case: Case, units: Sequence[Unit]) -> _State:
    e, g, d = case.itemsize, case.grad_itemsize, case.shards
    layers, rest = units[:-1], units[-1]
    whole, share = sum(unit.elements for unit in units), held_share(case, units)
    moments = 4 * case.moments * sum(unit.optimized(shards_of(case, unit)) for unit in units)
    kept = {"master weights": 4 * share, "optimizer": moments}
    if case.data_ranks == 1 and e == 4:
        running = {"weights": 4 * share, "optimizer": moments, "gradients": 4 * share}
        return _State(running=running, finishing=running, updating=running, reduction=0)
    largest = max((unit.elements for unit in layers), default=0)
    several = case.microbatches > 1
    early = case.zero_stage >= 2  # gradients are reduced after every micro-batch
    gathered = e * whole if case.zero_stage < 3 else e * min(whole, rest.elements + 3 * largest)
    summed = (4 * share if early else g * whole) if several else 0
    fresh = 0 if several and not early else e  # gradients as the backward pass makes them; else summed in place
    reduced = max((held_share(case, [unit]) for unit in layers), default=0)
    buffers = (fresh + g) * largest + 4 * reduced
    end = (fresh + g) * rest.elements + 4 * rest.shard(d)
    of_layers = 4 * held_share(case, layers)
    left = (4 * rest.shard(d) if early else g * rest.elements) if several else 0
    return _State(
        running=kept | {"weights": gathered, "gradients": summed},
        finishing=kept | {"weights": e * rest.elements, "gradients": of_layers + left, "working memory": end},
        updating=kept | {"gradients": 4 * share},
        reduction=buffers,
        reduces_often=early,
    )


def _deepspeed(case: Case, units: Sequence[Unit]) -> _State:
    """DeepSpeed 0.19: measured on its CPU accelerator, see the tests. With offload the state lies on the host."""
    e, stage = case.itemsize, case.zero_stage
    kinds = [sum(unit.elements for unit in units if unit.experts == experts) for experts in (False, True)]
    whole = sum(kinds)
    share = sum(-(-unit.elements // shards_of(case, unit)) for unit in units)
    bucket = min(case.bucket, max(kinds))  # shared experts are reduced apart from the rest
    moments = 4 * case.moments
    if stage == 0:
        running = {"weights": 4 * whole, "optimizer": moments * whole, "gradients": 4 * whole}
        return _State(running=running, finishing=running, updating=running, reduction=4 * bucket)
    on_device = 0 if case.offload else 1
    kept = {"master weights": 4 * share * on_device, "optimizer": moments * share * on_device}
    sent = 4 if e == 2 and case.grad_itemsize == 4 else e  # bytes of a gradient in a reduction
    if stage == 1 and sent != e:  # its BF16_Optimizer
        kept |= {"weights": e * whole, "gradients": (4 + e) * whole}
        return _State(running=kept, finishing=kept, updating=kept, reduction=sent * bucket)
    if stage == 1:
        kept |= {"weights": e * whole, "gradients": e * whole}
        return _State(running=kept, finishing=kept, updating=kept, reduction=e * case.bucket)
    if stage == 2:
        kept |= {"weights": e * whole, "gradients": 4 * share * on_device}
        copy = sent * bucket if sent != e else 0
        return _State(running=kept, finishing=kept, updating=kept, reduction=e * (case.bucket + bucket) + copy)
    live = min(case.live_parameters, whole)
    own = 0 if case.offload_parameters else e * share
    kept |= {"weights": own + e * live, "gradients": 4 * share * on_device}
    return _State(running=kept, finishing=kept, updating=kept, reduction=sent * case.bucket + e * bucket)


def _logits_and_loss(case: Case) -> tuple[int, int]:
    """Bytes of the logits that are kept, and of what their gradients need beside them."""
    logits = activations.logits_bytes(case)
    if case.kernels.whole_logits:
        return logits, logits + 4 * _loss_chunk(case)
    block = min(BLOCK_ELEMENTS, logits // case.itemsize // VOCABULARY_PARTS)
    # A part is there wide and twice in the dtype of the model; the gradient of the hidden states is summed wide.
    return 0, block * (4 + 2 * case.itemsize) + 4 * case.tokens * case.arch.hidden_size


def _loss_chunk(case: Case) -> int:
    """Logits of which a float32 copy exists at a time."""
    chunk = case.kernels.loss_chunk or (_CHUNK if case.tp == 1 else _CHUNK_TP)
    return min(chunk, activations.logits_bytes(case) // case.itemsize)


def _backward_of_a_layer(case: Case) -> int:
    """Gradients that live for a moment in the backward pass of a layer: those inside the feed-forward block, or the
    partial sums of the gradient of a column-parallel layer's input, whichever are more.
    """
    arch, t = case.arch, case.tp
    outer = (5 if t > 1 else 3) * arch.hidden_size
    dense = case.tokens * max(2 * arch.ffn_hidden_size // t, outer) * case.itemsize
    if arch.experts is None:
        return dense
    results = 3 * arch.hidden_size  # of the rows, behind the experts and back where they came from
    experts = case.expert_rows * max(2 * arch.experts.ffn_hidden_size // t, results) * case.itemsize
    return max(dense, experts)


def _eight_bit_products(case: Case, *, experts: bool) -> list[Product]:
    """The products of a layer that are of 8-bit numbers where there are any: not those of router and experts."""
    return [
        product
        for group in (*column_products(case, experts=experts), row_products(case, experts=experts))
        for product in group
    ]


def _kept_forms(case: Case, stages: Sequence[int]) -> int:
    """8-bit forms of the weights of some stages, where they are kept from pass to pass."""
    if not (case.fp8 and case.fp8_weights_kept):
        return 0
    kinds = [kind for stage in stages for kind in case.layers_with_experts(stage)]
    size = {
        kind: sum(product.inputs * product.outputs for product in _eight_bit_products(case, experts=kind))
        for kind in set(kinds)
    }
    return sum(size[kind] for kind in kinds)


def _casting(case: Case) -> int:
    """Float32 copies that a product of 8-bit numbers makes for a moment: two of the matrix that is cast, or one of each
    matrix and a second one of the largest.
    """
    if not case.fp8:
        return 0
    sizes = [
        (product.rows * product.inputs, product.inputs * product.outputs, product.rows * product.outputs)
        for product in _eight_bit_products(case, experts=False)
    ]
    if case.kernels.wide_products:
        return 4 * max(sum(matrices) + max(matrices) for matrices in sizes)
    return 8 * max(max(matrices) for matrices in sizes)


def _bytes_held(case: Case, pipeline_rank: int, sets: Sequence[Held]) -> int:
    """Bytes of the activations in the largest of some sets of micro-batches, and of what was received or read."""
    stages = case.stages.stages_of(pipeline_rank)
    whole = {stage: stage_activations(case, stage) for stage in stages}
    later = {
        stage: sum(activations.deferred_bytes(case, experts=kind) for kind in case.layers_with_experts(stage))
        for stage in stages
    }
    if case.stages.last in later:
        later[case.stages.last] += activations.deferred_head_bytes(case)
    held = max(sum(whole[at.stage] * at.running + later[at.stage] * at.deferred for at in found) for found in sets)
    received = 0 if case.pp == 1 else 2 * activations.hidden_bytes(case)
    return held + received + _batches(case)


def _batches(case: Case) -> int:
    """All micro-batches of a step: tokens, labels and the mask of the loss."""
    return case.microbatches * case.seq_length * case.micro_batch * (8 + 8 + 4)


def stage_activations(case: Case, stage: int) -> int:
    """Bytes that one micro-batch keeps in a stage."""
    held = activations.stage_bytes(case, stage) + activations.rotary_bytes(case)
    if stage == 0:
        held += activations.total(activations.embedding(case))
    if stage == case.stages.last:
        held += activations.total(activations.head(case))
    elif case.engine == "deepspeed":
        held += activations.hidden_bytes(case)  # its pipeline keeps what it has sent until the backward pass
    return held
