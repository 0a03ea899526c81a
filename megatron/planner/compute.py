"""How long one rank computes: matrix products, attention, and everything that only moves data.

Legend as in `megatron.planner.activations`; m, n, k are the sides of a matrix product. A product of finite size runs at
`peak * matmul / (1 + knee / min(m, n, k))`; a small knee stands for its memory traffic, too. Element-wise kernels take
the time of their memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.planner import activations
from megatron.planner.case import Case
from megatron.planner.machines import MEMORY_EFFICIENCY, Machine
from megatron.training.flops import attention_pairs

_BACKWARD_ATTENTION = 2.5
"""Operations of a fused attention kernel's backward pass, relative to its forward pass: five products for two."""
_REFERENCE_HEAD_DIM = 128
_HEAD_DIM_KNEE = 64
"""Fused attention at head dim 64 runs at 0.75 of its rate at 128 (FlashAttention-3 paper): d / (d + 64)."""
_SCORES_ACCESSES = 10
"""Float32 reads and writes per score of unfused attention: scale, mask and softmax, or their backward passes."""
_LOSS_FORWARD, _LOSS_BACKWARD = 30, 24
"""Bytes moved per logit by the chunked cross entropy: its float32 passes over each chunk."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time of a forward or backward pass, by what it is spent on."""

    matmul: float = 0.0
    attention: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.matmul + self.attention + self.other

    def __add__(self, more: Seconds) -> Seconds:
        return Seconds(
            matmul=self.matmul + more.matmul,
            attention=self.attention + more.attention,
            other=self.other + more.other,
        )

    def times(self, factor: float) -> Seconds:
        """The same `factor` times."""
        return Seconds(matmul=self.matmul * factor, attention=self.attention * factor, other=self.other * factor)


@dataclass(frozen=True)
class Product:
    """A linear layer's product on one rank: [rows, inputs] times [inputs, outputs]."""

    rows: int
    inputs: int
    outputs: int


def product_seconds(case: Case, product: Product, *, fp8: bool = False) -> float:
    """Time of one matrix product: the forward pass, or either of the two in the backward pass."""
    flops = 2.0 * product.rows * product.inputs * product.outputs
    side = min(product.rows, product.inputs, product.outputs)
    return flops / _best_rate(case, fp8=fp8) * (1.0 + case.machine.knee / side)


def moved(machine: Machine, size: float) -> float:
    """Time of an element-wise kernel that reads and writes `size` bytes in all."""
    return size / (machine.bandwidth * MEMORY_EFFICIENCY)


def _best_rate(case: Case, *, fp8: bool) -> float:
    machine = case.machine
    if fp8 and machine.fp8_peak is not None:
        return machine.fp8_peak * machine.fp8_matmul
    return (machine.fp32_peak if case.itemsize == 4 else machine.peak) * machine.matmul


def column_products(case: Case, *, experts: bool = False) -> tuple[tuple[Product, ...], tuple[Product, ...]]:
    """Products that share an input: query, key and value; and one or two of the block that every token visits."""
    arch, rows = case.arch, case.tokens
    query = arch.num_heads * arch.head_dim // case.tp
    key = Product(rows, arch.hidden_size, case.kv_heads * arch.head_dim)
    width = activations.dense_width(case, experts=experts) // case.tp
    inner = (Product(rows, arch.hidden_size, width),) * (2 if arch.gated else 1) if width else ()
    return (Product(rows, arch.hidden_size, query), key, key), inner


def row_products(case: Case, *, experts: bool = False) -> tuple[Product, ...]:
    """Products behind attention and behind the activation."""
    arch, rows = case.arch, case.tokens
    query = arch.num_heads * arch.head_dim // case.tp
    width = activations.dense_width(case, experts=experts) // case.tp
    return tuple(Product(rows, inputs, arch.hidden_size) for inputs in (query, width) if inputs)


def expert_products(case: Case) -> tuple[Product, ...]:
    """Products of the router and of all experts of a rank, which get equally many rows."""
    arch, experts = case.arch, case.arch.experts
    assert experts is not None
    local = experts.count // case.ep
    rows, inner = max(1, case.expert_rows // local), experts.ffn_hidden_size // case.tp
    columns = (Product(rows, arch.hidden_size, inner),) * ((2 if arch.gated else 1) * local)
    router = Product(case.tokens, arch.hidden_size, experts.count)
    return (router, *columns, *(Product(rows, inner, arch.hidden_size),) * local)


def layer_products(case: Case, *, experts: bool = False) -> tuple[Product, ...]:
    """All products of a layer, with experts or without."""
    qkv, inner = column_products(case, experts=experts)
    return (*qkv, *inner, *row_products(case, experts=experts), *(expert_products(case) if experts else ()))


def layer_forward(case: Case, *, experts: bool = False) -> Seconds:
    """The forward pass of a layer, with experts or without."""
    products = layer_products(case, experts=experts)
    matmul = sum(product_seconds(case, product, fp8=case.fp8) for product in products)
    size = _forward_accesses(case, experts=experts) * case.itemsize + (_casts(case, products) if case.fp8 else 0)
    return Seconds(matmul=matmul, attention=attention_seconds(case)[0], other=moved(case.machine, size))


def layer_backward(case: Case, *, experts: bool = False) -> Seconds:
    """The backward pass of a layer, with experts or without; recomputation left out."""
    products = layer_products(case, experts=experts)
    matmul = 2 * sum(product_seconds(case, product, fp8=case.fp8) for product in products)
    size = _backward_accesses(case, experts=experts) * case.itemsize + (_casts(case, products) if case.fp8 else 0)
    return Seconds(matmul=matmul, attention=attention_seconds(case)[1], other=moved(case.machine, size))


def attention_seconds(case: Case) -> tuple[float, float]:
    """Forward and backward time of scores, softmax and weighted sum of one layer."""
    arch, machine, kernel = case.arch, case.machine, case.kernels.attention
    heads = arch.num_heads // case.tp * case.micro_batch
    # A kernel with an explicit mask computes the hidden half of the scores, too.
    all_pairs = kernel in ("masked", "weights", "reference")
    pairs = case.seq_length**2 if all_pairs else attention_pairs(case.seq_length, arch.sliding_window)
    flops = 4.0 * pairs / case.cp * arch.head_dim * heads
    if kernel in ("blocked", "reference"):
        rate = _best_rate(case, fp8=False) / (1.0 + machine.knee / arch.head_dim)
        scores = moved(machine, 4.0 * _SCORES_ACCESSES * pairs / case.cp * heads)
        return flops / rate + scores, 2.0 * (flops / rate + scores)
    peak = machine.fp32_peak if case.itemsize == 4 else machine.peak
    shape = _head_dim_rate(arch.head_dim) / _head_dim_rate(_REFERENCE_HEAD_DIM)
    forward, backward = (flops / (share * shape * peak) for share in machine.attention)
    if kernel == "weights":  # which need not be computed again, but are written and read
        weights = moved(machine, float(case.itemsize) * pairs / case.cp * heads)
        return forward + weights, 2.0 * backward + weights
    return forward, _BACKWARD_ATTENTION * backward


def _head_dim_rate(head_dim: int) -> float:
    return head_dim / (head_dim + _HEAD_DIM_KNEE)


def embedding_seconds(case: Case) -> tuple[Seconds, Seconds]:
    """Forward and backward time of the embedding: a row is read and written; its gradient fills a table."""
    arch = case.arch
    row = case.tokens * arch.hidden_size * case.itemsize
    table = arch.padded_vocab_size // case.tp * arch.hidden_size * case.itemsize
    return Seconds(other=moved(case.machine, 2 * row)), Seconds(other=moved(case.machine, 3 * row + table))


def head_seconds(case: Case) -> tuple[Seconds, Seconds]:
    """Forward and backward time of final norm, head and loss."""
    arch = case.arch
    product = Product(case.tokens, arch.hidden_size, arch.padded_vocab_size // case.tp)
    once = product_seconds(case, product)
    logits = activations.logits_bytes(case) / case.itemsize
    hidden = case.tokens * arch.hidden_size * case.itemsize
    forward = Seconds(matmul=once, other=moved(case.machine, _LOSS_FORWARD * logits + 2 * hidden))
    products = 2 if case.kernels.whole_logits else 3  # logits are computed again
    backward = Seconds(matmul=products * once, other=moved(case.machine, _LOSS_BACKWARD * logits + 4 * hidden))
    return forward, backward


def recomputed(case: Case, stage: int) -> Seconds:
    """What is computed again in the backward pass of a stage, for one micro-batch."""
    plan, layers = case.recompute.of_stage(stage), case.stages.layers[stage]
    if plan.granularity == "selective":
        return Seconds(attention=attention_seconds(case)[0]).times(layers)
    kinds = case.layers_with_experts(stage)
    if plan.granularity == "mlp":
        return sum_over(kinds, lambda experts: _feed_forward_again(case, experts=experts))
    again = [kinds[number] for span in plan.spans(layers) if span.again for number in span.layers]
    return sum_over(again, lambda experts: layer_forward(case, experts=experts))


def sum_over(kinds: Sequence[bool], seconds: Callable[[bool], Seconds]) -> Seconds:
    """Time of all layers, for each of which `kinds` says whether it has experts."""
    result = Seconds()
    for kind in set(kinds):
        result += seconds(kind).times(kinds.count(kind))
    return result


def _feed_forward_again(case: Case, *, experts: bool) -> Seconds:
    _, products = column_products(case, experts=experts)
    products += expert_products(case) if experts else ()
    matmul = sum(product_seconds(case, product, fp8=case.fp8) for product in products)
    _, _, inner = _sizes(case, experts=experts)
    accesses = 5 * inner + (_routing_accesses(case) if experts else 0)
    return Seconds(matmul=matmul, other=moved(case.machine, accesses * case.itemsize))


def _forward_accesses(case: Case, *, experts: bool) -> float:
    """Elements that the element-wise kernels of a layer's forward pass read and write.

    One by one: a norm reads and writes, an addition reads twice and writes, SwiGLU is two kernels, and the rotation
    takes five accesses per channel. Compiled, each of them is one pass over its arguments.
    """
    hidden, heads, inner = _sizes(case, experts=experts)
    routing = _routing_accesses(case) if experts else 0
    bias = 6 if case.arch.linear_bias else 0
    dropout = 6 if case.arch.hidden_dropout > 0.0 else 0
    if case.compiled:
        return 8 * hidden + 2 * heads + 3 * inner
    return (10 + bias + dropout) * hidden + 5 * heads + 5 * inner + routing


def _backward_accesses(case: Case, *, experts: bool) -> float:
    """The same for the backward pass, with the sums of the gradients of inputs that several products share."""
    hidden, heads, inner = _sizes(case, experts=experts)
    routing = 2 * _routing_accesses(case) if experts else 0
    dropout = 6 if case.arch.hidden_dropout > 0.0 else 0
    activation = 11 if case.arch.gated else 5
    sums = (9 if case.arch.gated else 6) * hidden * case.split
    if case.compiled:
        return 10 * hidden + 2 * heads + 5 * inner + sums
    return (14 + dropout) * hidden + 5 * heads + activation * inner + sums + routing


def _routing_accesses(case: Case) -> float:
    """Elements that router and dispatch move in a forward pass: the router widens its input to float32 and reads that;
    rows are gathered, and results of choices gathered and weighed; ranks that share experts sort rows by expert and
    back.
    """
    experts, wide = case.arch.experts, 4 / case.itemsize
    assert experts is not None
    sorts = 4 if 1 < case.ep < experts.count else 0
    rows = (2 + sorts) * case.expert_rows + 3 * case.tokens * experts.topk
    return (rows + (2 + 2 * wide) * case.tokens) * case.arch.hidden_size


def _sizes(case: Case, *, experts: bool) -> tuple[float, float, float]:
    """Elements of hidden states between layers, of queries and keys that are rotated, and of the inner features."""
    arch, rows = case.arch, case.tokens
    rotated = arch.head_dim if arch.position == "rope" else 0
    heads = (arch.num_heads / case.tp + case.kv_heads) * rotated
    inner = rows * activations.dense_width(case, experts=experts)
    if experts and arch.experts is not None:
        inner += case.expert_rows * arch.experts.ffn_hidden_size
    return rows * arch.hidden_size / case.split, rows * heads, inner / case.tp


def _casts(case: Case, products: tuple[Product, ...]) -> float:
    """Bytes moved to bring the arguments of products into FP8, in both layouts: read twice, write two at one byte."""
    return float(sum(4 * product.rows * (product.inputs + product.outputs) for product in products))
