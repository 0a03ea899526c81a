"""What the model keeps for the backward pass, tensor by tensor.

The lists below say what `megatron.model` saves with this project's operations; tests measure that they do. Bytes are
those of one micro-batch on one rank. Legend: T = tokens of the micro-batch on this rank, S = ranks among which tokens
are split between layers (sequence parallelism), t = tensor-parallel ranks, h=hidden, n=query heads, g=kv heads,
d=head dim, f=ffn, v=padded vocabulary, E=experts, k=experts of a token, m=rows of all experts of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.mpu.schedule import splits_backward
from megatron.mpu.ulysses import copies_of_kv_heads
from megatron.ops.blocked_attention import BLOCK_ROWS, KEEP_WEIGHTS_UP_TO
from megatron.planner.case import Case


@dataclass(frozen=True)
class Saved:
    """A tensor that is kept.

    Attributes:
        what: what it is.
        bytes: its size.
    """

    what: str
    bytes: int


def layer(case: Case, *, experts: bool = False) -> tuple[Saved, ...]:
    """What one layer, with experts or without, keeps when nothing in it is recomputed as a whole."""
    return (*_attention_block(case), *_feed_forward(case, experts=experts))


def _layer_bytes(case: Case, stage: int) -> list[int]:
    """The same in bytes, for each layer of a stage."""
    kinds = case.layers_with_experts(stage)
    size = {kind: total(layer(case, experts=kind)) for kind in set(kinds)}
    return [size[kind] for kind in kinds]


def stage_bytes(case: Case, stage: int) -> int:
    """What the layers of a stage keep on the device under the case's recomputation."""
    spans = case.recompute.of_stage(stage).spans(case.stages.layers[stage])
    sizes = _layer_bytes(case, stage)
    return sum(
        hidden_bytes(case) if span.again else sum(sizes[number] for number in span.layers)
        for span in spans
        if not span.on_host
    )


def returned_bytes(case: Case, stage: int) -> int:
    """What comes back in the backward pass of a group of layers, from recomputation or from the host, at most."""
    spans = case.recompute.of_stage(stage).spans(case.stages.layers[stage])
    again = 0
    if case.recompute.granularity == "mlp":
        kinds = set(case.layers_with_experts(stage))
        again = max((total(_in_feed_forward(case, experts=kind)) for kind in kinds), default=0)
        again += _input_of_feed_forward(case) if _casts_inputs(case) else 0
    sizes = _layer_bytes(case, stage)
    for span in spans:
        if span.again or span.on_host:
            kept = 0 if span.on_host else hidden_bytes(case)
            again = max(again, sum(sizes[number] for number in span.layers) - kept)
    return again


def deferred_bytes(case: Case, *, experts: bool = False) -> int:
    """What a layer keeps when the gradients of its weights are left for later: arguments of the products.

    Those of router and experts are not left for later.
    """
    arch, t, rows = case.arch, case.tp, case.tokens
    query = rows * arch.num_heads * arch.head_dim // t * case.itemsize
    key = rows * case.kv_heads * arch.head_dim * case.itemsize
    inner = rows * dense_width(case, experts=experts) // t * case.itemsize
    blocks = 2 if inner else 1
    inputs = blocks * _normed(case) + query + inner
    results = blocks * rows * arch.hidden_size * case.itemsize
    return inputs + query + 2 * key + (2 if arch.gated else 1) * inner + results


def deferred_head_bytes(case: Case) -> int:
    """The same for the head: its input and the gradient of the logits."""
    return _normed(case) + logits_bytes(case)


def dense_width(case: Case, *, experts: bool) -> int:
    """Inner features of the block of a layer that every token visits; 0 = there is none beside the experts."""
    if not experts or case.arch.experts is None:
        return case.arch.ffn_hidden_size
    return case.arch.experts.shared_ffn_hidden_size


def hidden_bytes(case: Case) -> int:
    """Hidden states between two layers."""
    return case.tokens // case.split * case.arch.hidden_size * _residual_itemsize(case)


def embedding(case: Case) -> tuple[Saved, ...]:
    """What the embedding keeps; its output is the first layer's input."""
    arch, tokens, split = case.arch, case.tokens, case.split
    found = [Saved("token ids", tokens * 8)]
    if case.tp > 1:
        found.append(Saved("tokens of other ranks", tokens))
    if arch.embedding_norm:
        found.append(Saved("embedding norm: input", tokens * arch.hidden_size * case.itemsize // split))
    if arch.hidden_dropout > 0.0:
        found.append(_mask(case, "embedding"))
    return tuple(found)


def head(case: Case) -> tuple[Saved, ...]:
    """What final norm, head and loss keep; the norm's input is the last layer's output."""
    tokens = case.tokens
    norm = (
        Saved("final norm: input", hidden_bytes(case)),
        Saved("final norm: row statistics", tokens // case.split * _statistics(case)),
    )
    if not case.kernels.whole_logits:
        return (
            *norm,
            Saved("head: input of all ranks", _normed(case) * case.split),
            Saved("loss: labels, normalizers and losses", tokens * (16 if case.tp == 1 else 24)),
        )
    return (
        *norm,
        Saved("head: input", _normed(case)),
        Saved("logits", logits_bytes(case)),
        Saved("loss: labels, normalizers and losses", tokens * (8 if case.tp == 1 else 16)),
    )


def logits_bytes(case: Case) -> int:
    """Logits of one rank [T, v/t]."""
    return case.tokens * (case.arch.padded_vocab_size // case.tp) * case.itemsize


def rotary_bytes(case: Case) -> int:
    """Cosines and sines [s, 1 or b, 1, r] in float32, shared by all layers of a micro-batch."""
    if case.arch.position != "rope":
        return 0
    rows = case.seq_length // case.cp * (case.micro_batch if case.documents else 1)
    return 2 * 4 * rows * int(case.arch.head_dim * case.arch.rope_percent)


def total(found: Sequence[Saved]) -> int:
    """Bytes of all."""
    return sum(item.bytes for item in found)


def _attention_block(case: Case) -> list[Saved]:
    arch, t, rows = case.arch, case.tp, case.tokens
    query = rows * arch.num_heads * arch.head_dim // t * case.itemsize
    key = rows * case.kv_heads * arch.head_dim * case.itemsize
    found = [
        Saved("attention norm: input", hidden_bytes(case)),
        Saved("attention norm: row statistics", rows // case.split * _statistics(case)),
        Saved("query, key, value: input", _inputs(case, _normed(case), arch.hidden_size, 3)),
    ]
    if arch.qk_norm:
        heads = arch.num_heads // t + case.kv_heads
        found += [Saved("query and key norm: input and statistics", query + key + rows * heads * _statistics(case))]
    if case.recompute.granularity != "selective":
        key *= copies_of_kv_heads(case.kv_heads, case.ulysses)
    found += [Saved("query", query), Saved("key and value", 2 * key), *_attention_extra(case)]
    found.append(Saved("attention result", _inputs(case, query, arch.num_heads * arch.head_dim // t, 1)))
    if _casts_inputs(case) and _kernel_keeps_result(case):
        found.append(Saved("attention result: of the kernel", query))
    if arch.hidden_dropout > 0.0:
        found.append(_mask(case, "attention"))
    return found


def _kernel_keeps_result(case: Case) -> bool:
    """Whether the attention kernel itself keeps what the next product takes."""
    ring = case.cp > case.ulysses
    return (
        case.recompute.granularity != "selective"
        and case.ulysses == 1
        and (ring or case.kernels.attention in ("fused", "masked"))
    )


def _attention_extra(case: Case) -> list[Saved]:
    """What the kernel keeps beside its arguments and its result; recomputation of attention drops it."""
    arch = case.arch
    heads, length, batch = arch.num_heads // case.tp, case.seq_length, case.micro_batch
    if case.recompute.granularity == "selective":
        return []
    normalizers = Saved("attention: row normalizers", case.tokens * heads * 4)
    by_heads = [Saved("attention result by heads", case.tokens * heads * arch.head_dim * case.itemsize)]
    by_heads *= case.ulysses > 1
    if case.cp > case.ulysses:
        return [normalizers, *by_heads]
    pairs = batch * heads // case.cp * length * length
    if case.kernels.attention == "reference":
        # Everything is widened to float32, with a copy of key and value for every query head.
        widened = case.tokens * arch.head_dim * (12 * heads - case.itemsize * (heads + 2 * case.kv_heads))
        dropped = 8 * pairs if arch.attention_dropout > 0.0 else 0
        return [Saved("attention weights and wide copies", 4 * pairs + dropped + length * length + widened)]
    if case.kernels.attention == "blocked":
        pairs = batch * heads // case.cp * _blocked_pairs(length, arch.sliding_window)
        kept = pairs * case.itemsize if length <= KEEP_WEIGHTS_UP_TO else 0
        return [Saved("attention weights", kept + (pairs if arch.attention_dropout > 0.0 else 0))]
    if case.kernels.attention == "weights":
        return [Saved("attention weights", pairs * case.itemsize)]
    found = [normalizers, *by_heads]
    if case.kernels.attention == "masked":
        copies = (heads if arch.position == "alibi" else 1) * (batch if case.documents else 1)
        found.append(Saved("attention mask", copies * length * length // case.cp * case.itemsize))
    return found


def _blocked_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of one head that the blocked kernel computes."""
    pairs = 0
    for start in range(0, length, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, length)
        first = 0 if window is None else max(0, start - window + 1)
        pairs += (end - start) * (end - first)
    return pairs


def _feed_forward(case: Case, *, experts: bool) -> list[Saved]:
    found = [
        Saved("feed-forward norm: input", hidden_bytes(case)),
        Saved("feed-forward norm: row statistics", case.tokens // case.split * _statistics(case)),
    ]
    again = case.recompute.granularity == "mlp"
    if again:
        found.append(Saved("feed-forward: input", _normed(case)))
    elif dense_width(case, experts=experts):
        found.append(Saved("feed-forward: input", _input_of_feed_forward(case)))
    if not again:
        found += _in_feed_forward(case, experts=experts)
    if case.arch.hidden_dropout > 0.0:
        found.append(_mask(case, "feed-forward"))
    return found


def _input_of_feed_forward(case: Case) -> int:
    return _inputs(case, _normed(case), case.arch.hidden_size, 2 if case.arch.gated else 1)


def _inputs(case: Case, plain: int, columns: int, products: int) -> int:
    """What products of one input [T, columns] keep of it: each an 8-bit form, or all of them the same `plain` bytes.

    Products of 8-bit numbers see the tokens of all tensor-parallel ranks, and keep what they see.
    """
    if not case.fp8 or splits_backward(case.schedule):
        return plain
    return case.tokens * columns * (products if case.fp8_weight_gradients else case.itemsize)


def _casts_inputs(case: Case) -> bool:
    """Whether products keep another form of their input than what is there anyway."""
    return case.fp8 and case.fp8_weight_gradients and not splits_backward(case.schedule)


def _in_feed_forward(case: Case, *, experts: bool) -> list[Saved]:
    """What the feed-forward block keeps beside its input."""
    width = dense_width(case, experts=experts)
    dense = _inner(case, case.tokens, width)
    if case.fp8:
        down = _inputs(case, dense[0].bytes, width // case.tp, 1)
        dense = [Saved("down: input", down), *dense[1:]]
        if case.arch.activation == "relu" and _casts_inputs(case):
            dense.append(Saved("activation: result", case.tokens * width // case.tp * case.itemsize))
    return [*dense, *(_in_experts(case) if experts else [])]


def _inner(case: Case, rows: int, width: int) -> list[Saved]:
    """What a block of `width` inner features keeps of so many rows beside its input."""
    inner = rows * width // case.tp * case.itemsize
    found = [Saved("down: input", inner)]
    if case.arch.gated:
        found.append(Saved("gate and up", 2 * inner))
    elif case.arch.activation != "relu":  # ReLU's backward pass looks at its result, which the next product keeps
        found.append(Saved("activation: input", inner))
    return found


def _in_experts(case: Case) -> list[Saved]:
    """What router and experts keep. The router works in float32, on all tokens of all tensor-parallel ranks."""
    arch, experts, rows = case.arch, case.arch.experts, case.expert_rows
    assert experts is not None
    tokens, choices, hidden = case.tokens, case.tokens * experts.topk, arch.hidden_size
    # A float32 model's router looks at the block's input itself, which the shared block keeps.
    same_input = case.itemsize == 4 and case.split == 1 and experts.shared_ffn_hidden_size > 0
    wide = (0 if same_input else 4 * tokens * hidden) + (4 * experts.count * hidden if case.itemsize == 2 else 0)
    weights = choices * (4 + (0 if experts.pre_softmax else 4) + (case.itemsize if case.itemsize == 2 else 0))
    orders = 8 * (rows + choices)
    if case.ep > 1 and experts.count > case.ep:  # sorted by expert, and back
        orders += 2 * 8 * rows
    if arch.linear_bias:  # rows of the biases
        orders += 8 * rows * (3 if arch.gated else 2)
    return [
        Saved("router: input and weight in float32", wide),
        Saved("router: logits, scores and normalizers", tokens * (2 * experts.count + 2) * 4),
        Saved("router: choices and their weights", 8 * choices + weights),
        Saved("experts: order of the rows", orders),
        Saved("experts: input", rows * hidden * case.itemsize),
        *_inner(case, rows, experts.ffn_hidden_size),
        Saved("experts: results of all choices", choices * hidden * case.itemsize),
    ]


def _mask(case: Case, where: str) -> Saved:
    elements = case.tokens // case.split * case.arch.hidden_size
    return Saved(f"{where}: dropout mask", elements * case.kernels.dropout_mask)


def _normed(case: Case) -> int:
    """Hidden states behind a norm: in the model's dtype, whatever that of the residual stream."""
    return case.tokens // case.split * case.arch.hidden_size * case.itemsize


def _residual_itemsize(case: Case) -> int:
    return 4 if case.arch.fp32_residual else case.itemsize


def _statistics(case: Case) -> int:
    """Bytes per row that a norm keeps: one float32 for RMSNorm, two for LayerNorm."""
    return 8 if case.arch.norm == "layernorm" else 4
