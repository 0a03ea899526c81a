"""What Megatron and the programs made of it call their tensors, and how those are made of logical ones.

Queries, keys and values are one tensor, stored per key-value group [q ... q, k, v] (version 2.0 of the format and on),
so that any number of ranks that divides the groups gets whole groups by cutting it in equal parts. In version 0 a rank
has all its queries, then all its keys, then all its values; so has Megatron-DeepSpeed since December 2024, whose files
say 3.0. In version 1.0 the three alternate row by row. Gate and up-projection are one tensor in most dialects, of
which each rank has [gate; up]. Experts are tensors of their own, but in torch_dist, where those of a layer are one.
Legend: h=hidden, n=query heads, g=kv heads, d=head dim, f=ffn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.formats.model import VOCABULARY, parameter_shapes, unpadded
from megatron.checkpoint.formats.parts import Split
from megatron.config.architecture import Architecture
from megatron.model.hf import Entry, Layout, stacks
from megatron.mpu.sharding import shard_dim

Place = int | Literal["first", "last"]

_QKV = ("attention.query", "attention.key", "attention.value")
_GATED = ("mlp.gate", "mlp.up")
_EXPERTS = ("mlp.experts.gate", "mlp.experts.up", "mlp.experts.down")
_SAME = Layout(split=lambda x: (x,), join=lambda parts: parts[0])
_HALVES = Layout(split=lambda x: x.chunk(2), join=torch.cat)
_HALVES_OF_EACH = Layout(split=lambda x: x.chunk(2, 1), join=lambda parts: torch.cat(parts, 1))


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One way to name the tensors. `{}` in a name stands for "weight" or "bias".

    Attributes:
        layers: what stands before the name of a tensor of a layer; `{}` is the number of the layer.
        first_layer: the number of the first layer.
        ends: names of the tensors that belong to no layer, by logical name.
        parts: names of the tensors of a layer, by logical name; that of the query is the name of q, k and v together.
        fused_gate: name of gate and up-projection together; None: they are separate.
        frequencies: name of the rotary frequencies of each layer, which AscendSpeed stores.
        nested: beginnings of names that are dictionaries in dictionaries, one per part of the name.
        experts: names in layers with experts, before those of `parts`. `{number}` is the number of an expert; without
            it a tensor holds all experts of a layer. Without a name for the gate it is in one tensor with the
            up-projection.
    """

    layers: str
    ends: Mapping[str, str]
    parts: Mapping[str, str]
    fused_gate: str | None
    first_layer: int = 0
    frequencies: str | None = None
    nested: tuple[str, ...] = ()
    experts: Mapping[str, str] = field(default_factory=dict)

    def stacks(self, arch: Architecture) -> Mapping[str, int]:
        """For `lazy.unstack_view`: the logical tensors that hold all experts of a layer, if the dialect's do not."""
        return stacks(arch) if any(_NUMBER in name for name in self.experts.values()) else {}


_NUMBER = "{number}"
_MEGATRON_PARTS = {
    "attention_norm": "input_layernorm.{}",
    "attention.query": "self_attention.query_key_value.{}",
    "attention.query_norm": "self_attention.q_layernorm.{}",
    "attention.key_norm": "self_attention.k_layernorm.{}",
    "attention.output": "self_attention.dense.{}",
    "mlp_norm": "post_attention_layernorm.{}",
    "mlp.up": "mlp.dense_h_to_4h.{}",
    "mlp.down": "mlp.dense_4h_to_h.{}",
    "mlp.router": "mlp.deepspeed_moe.gate.wg.{}",
}
_MEGATRON_ENDS = {
    "embedding.word": "language_model.embedding.word_embeddings.{}",
    "embedding.position": "language_model.embedding.position_embeddings.{}",
    "embedding.norm": "language_model.embedding.word_embeddings.norm.{}",
    "final_norm": "language_model.encoder.final_layernorm.{}",
    "head": "language_model.output_layer.{}",
}
_MEGATRON_NESTED = (
    *("language_model.embedding.word_embeddings", "language_model.embedding.position_embeddings"),
    *("language_model.encoder", "language_model.output_layer", "word_embeddings_for_head"),
)
_CORE_PARTS = {
    "attention_norm": "input_layernorm.{}",
    "attention.query": "self_attention.linear_qkv.{}",
    "attention.query_norm": "self_attention.q_layernorm.{}",
    "attention.key_norm": "self_attention.k_layernorm.{}",
    "attention.output": "self_attention.linear_proj.{}",
    "mlp_norm": "pre_mlp_layernorm.{}",
    "mlp.up": "mlp.linear_fc1.{}",
    "mlp.down": "mlp.linear_fc2.{}",
    "mlp.router": "mlp.router.{}",
}
_CORE_ENDS = {
    "embedding.word": "embedding.word_embeddings.{}",
    "embedding.position": "embedding.position_embeddings.{}",
    "final_norm": "decoder.final_layernorm.{}",
    "head": "output_layer.{}",
}
_CORE = Dialect(
    layers="decoder.layers.{}.",
    ends=_CORE_ENDS,
    parts=_CORE_PARTS,
    fused_gate=_CORE_PARTS["mlp.up"],
    experts={
        "mlp.experts.up": "mlp.experts.local_experts.{number}.linear_fc1.{}",
        "mlp.experts.down": "mlp.experts.local_experts.{number}.linear_fc2.{}",
    },
)
_CORE_FUSED_NORMS = {
    "attention_norm": "self_attention.linear_qkv.layer_norm_{}",
    "mlp_norm": "mlp.linear_fc1.layer_norm_{}",
}
_CORE_TE = replace(
    _CORE,
    parts={**_CORE_PARTS, **_CORE_FUSED_NORMS},
    experts={**_CORE.experts, "mlp_norm": _CORE_PARTS["mlp_norm"]},
)
_CORE_GROUPED = {
    "mlp.experts.up": "mlp.experts.linear_fc1.{}{number}",
    "mlp.experts.down": "mlp.experts.linear_fc2.{}{number}",
}
_CORE_STACKED = {
    "mlp.experts.up": "mlp.experts.experts.linear_fc1.{}",
    "mlp.experts.down": "mlp.experts.experts.linear_fc2.{}",
}
_DEEPSPEED_EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts.{number}"
_DEEPSPEED_EXPERTS = {
    "mlp.experts.up": f"{_DEEPSPEED_EXPERT}.dense_h_to_4h.{{}}",
    "mlp.experts.down": f"{_DEEPSPEED_EXPERT}.dense_4h_to_h.{{}}",
}
_ASCENDSPEED = Dialect(
    layers="language_model.layers.{}.",
    ends={
        "embedding.word": "embedding.word_embeddings.{}",
        "final_norm": "language_model.final_layernorm.{}",
        "head": "lm_head.lm_head.{}",
    },
    parts={
        "attention_norm": "input_layernorm.{}",
        "attention.query": "attention.query_key_value.{}",
        "attention.output": "attention.dense.{}",
        "mlp_norm": "post_attention_layernorm.{}",
        "mlp.gate": "mlp.gate_proj.{}",
        "mlp.up": "mlp.up_proj.{}",
        "mlp.down": "mlp.down_proj.{}",
    },
    fused_gate=None,
    frequencies="attention.rotary_emb.inv_freq",
)
_MODELLINK = Dialect(
    layers="language_model.encoder.layers.{}.",
    ends=_MEGATRON_ENDS,
    parts={**_MEGATRON_PARTS, "mlp.gate": "mlp.gate_proj.{}"},
    fused_gate=None,
    nested=_MEGATRON_NESTED,
    experts={**_DEEPSPEED_EXPERTS, "mlp.experts.gate": f"{_DEEPSPEED_EXPERT}.gate_proj.{{}}"},
)
_MODELLINK_MERGED = replace(
    _MODELLINK,
    fused_gate="mlp.proj.{}",
    experts={**_DEEPSPEED_EXPERTS, "mlp.experts.up": f"{_DEEPSPEED_EXPERT}.proj.{{}}"},
)

_MEGATRON = replace(_MODELLINK, parts=_MEGATRON_PARTS, fused_gate=_MEGATRON_PARTS["mlp.up"], experts=_DEEPSPEED_EXPERTS)
_LEGACY = replace(
    _MEGATRON,
    ends={**_MEGATRON_ENDS, "final_norm": "language_model.encoder.final_norm.{}"},
    parts={**_MEGATRON_PARTS, "attention_norm": "input_norm.{}", "mlp_norm": "post_attention_norm.{}"},
    experts={
        "mlp.router": "mlp.block.moe_layer.gate.weight.{}",
        "mlp.experts.gate": "mlp.block.moe_layer.experts.experts.{number}.w1.{}",
        "mlp.experts.up": "mlp.block.moe_layer.experts.experts.{number}.w3.{}",
        "mlp.experts.down": "mlp.block.moe_layer.experts.experts.{number}.w2.{}",
    },
)

DIALECTS: Mapping[str, Dialect] = {
    "megatron": _MEGATRON,
    "legacy": _LEGACY,
    "core": _CORE,
    "core-te": _CORE_TE,
    "core-te-grouped": replace(_CORE_TE, experts={**_CORE_TE.experts, **_CORE_GROUPED}),
    "core-te-stacked": replace(_CORE_TE, experts={**_CORE_TE.experts, **_CORE_STACKED}),
    "ascendspeed": _ASCENDSPEED,
    "ascendspeed-merged": replace(_ASCENDSPEED, fused_gate="mlp.proj.{}"),
    "modellink": _MODELLINK,
    "modellink-merged": _MODELLINK_MERGED,
}
"""megatron: Megatron-LM until 2023, Megatron-DeepSpeed. legacy: what Megatron-LM calls so, since the end of 2023, and
ModelLink on it, whose experts they are. core: Megatron-Core with its own layers; core-te: with those of Transformer
Engine, whose experts are one by one, grouped, or in torch_dist one tensor per layer. ascendspeed: of 2023; modellink:
its successor at first; merged: with --merge-mlp."""


PIPELINE = "pipeline"


def pipeline_dialect(arch: Architecture, *, with_lambdas: bool = False) -> Dialect:
    """The names of DeepSpeed's pipeline modules, which begin with the number of the module.

    Args:
        arch: of the model.
        with_lambdas: two more modules, before the layers and after them, as in Megatron-DeepSpeed until 2023 and in
            BigScience's, which trained BLOOM.
    """
    embedding = "tied_modules.embed" if arch.tied_embeddings else "1"
    first = 3 if with_lambdas else 2
    after = first + arch.num_layers + with_lambdas
    return Dialect(
        layers="{}.",
        first_layer=first,
        ends={
            "embedding.word": embedding + ".word_embeddings.{}",
            "embedding.position": embedding + ".position_embeddings.{}",
            "embedding.norm": embedding + ".word_embeddings.norm.{}",
            "final_norm": f"{after}.{{}}",
            "head": f"{after + 1}.lm_head.{{}}",
        },
        parts=_MEGATRON_PARTS,
        fused_gate=_MEGATRON_PARTS["mlp.up"],
        experts=_DEEPSPEED_EXPERTS,
    )


def dialects(arch: Architecture) -> dict[str, Dialect]:
    """All dialects that a model can be stored in, by name.

    AscendSpeed has a LLaMA of its own; the names of its other models are the later ones.
    """
    others = {"ascendspeed": _MODELLINK, "ascendspeed-merged": _MODELLINK_MERGED}
    return {
        **DIALECTS,
        **({} if arch.gated and arch.experts is None else others),
        PIPELINE: pipeline_dialect(arch),
        f"{PIPELINE}-lambdas": pipeline_dialect(arch, with_lambdas=True),
    }


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of a dialect.

    Attributes:
        place: number of its layer, or the end of the model it is at.
        name: within its layer, or the whole name.
        ours: the logical tensors it is made of.
        layout: how.
        split: how tensor-parallel ranks share it.
    """

    place: Place
    name: str
    ours: tuple[str, ...]
    layout: Layout
    split: Split | None

    @property
    def has_vocabulary_rows(self) -> bool:
        """Whether its rows are tokens, and so are padded."""
        return any(name in VOCABULARY for name in self.ours)

    def full_name(self, dialect: Dialect, layer: int | None = None) -> str:
        """The name with everything before it.

        Args:
            dialect: the one it belongs to.
            layer: number of the layer there; None: its number in the whole model.
        """
        if not isinstance(self.place, int):
            return self.name
        number = self.place if layer is None else layer
        return dialect.layers.format(number + dialect.first_layer) + self.name

    def entry(self, dialect: Dialect) -> Entry:
        """For the views of `lazy`."""
        return Entry(self.full_name(dialect), self.ours, self.layout)


def pieces(arch: Architecture, dialect: Dialect) -> list[Piece]:
    """All tensors of a model, in the order of the layers.

    Raises:
        CheckpointError: the dialect has no name for one of them.
    """
    return list(_pieces(arch, dialect))


def _pieces(arch: Architecture, dialect: Dialect) -> Iterator[Piece]:
    for name in parameter_shapes(unpadded(arch)):
        stem, _, kind = name.rpartition(".")
        place: Place = "first" if stem.startswith("embedding") else "last"
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            place = int(number)
        if stem in _QKV[1:] or (stem == "mlp.gate" and dialect.fused_gate):
            continue  # part of another one
        if stem == _EXPERTS[0] and stem not in dialect.experts:
            continue  # with the up-projection
        prefix = name.removesuffix(f"{stem}.{kind}")
        if stem in _EXPERTS and stem in dialect.experts and kind == "weight":
            yield from _expert_pieces(place, prefix, stem, dialect, arch)
            continue
        template, logical, layout = _template(stem, dialect, arch, place)
        if template is None:
            raise CheckpointError(f"{name} has no place in the format: its programs do not compute such a model")
        dim = shard_dim(name)
        yield Piece(
            place=place,
            name=template.format(kind),
            ours=tuple(f"{prefix}{part}.{kind}" for part in logical),
            layout=layout,
            split=None if dim is None else Split(dim, len(logical) if logical == _GATED else 1),
        )


def frequency_pieces(arch: Architecture, dialect: Dialect) -> list[Piece]:
    """The rotary frequencies that a dialect stores with every layer; they follow from the architecture."""
    if dialect.frequencies is None:
        return []
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    frequencies = 1.0 / arch.rope_theta**exponents
    layout = Layout(split=lambda _: (), join=lambda _: frequencies)
    return [
        Piece(place=layer, name=dialect.frequencies, ours=(), layout=layout, split=None)
        for layer in range(arch.num_layers)
    ]


def _expert_pieces(place: Place, prefix: str, stem: str, dialect: Dialect, arch: Architecture) -> Iterator[Piece]:
    """The gates, up- (with the gate, if it has no name of its own) or down-projections of the experts of a layer."""
    assert arch.experts is not None
    template = dialect.experts[stem]
    with_gate = stem == _EXPERTS[1] and arch.gated and _EXPERTS[0] not in dialect.experts
    parts = _EXPERTS[:2] if with_gate else (stem,)
    names = tuple(f"{prefix}{part}.weight" for part in parts)
    dim = 1 if stem == _EXPERTS[2] else 0
    if _NUMBER not in template:
        layout = _SAME if len(parts) == 1 else _HALVES_OF_EACH
        split = Split(dim + 1, len(parts))
        yield Piece(place=place, name=template.format("weight"), ours=names, layout=layout, split=split)
        return
    for number in range(arch.experts.count):
        yield Piece(
            place=place,
            name=template.format("weight", number=number),
            ours=tuple(f"{name}.{number}" for name in names),
            layout=_SAME if len(parts) == 1 else _HALVES,
            split=Split(dim, len(parts)),
        )


def _template(
    stem: str, dialect: Dialect, arch: Architecture, place: Place
) -> tuple[str | None, tuple[str, ...], Layout]:
    """Name, logical parts and layout of the tensor that begins with the parameter `stem`."""
    if not isinstance(place, int):
        return dialect.ends.get(stem), (stem,), _SAME
    if arch.has_experts(place) and stem in dialect.experts:
        return dialect.experts[stem], (stem,), _SAME
    if stem == "attention.query":
        return dialect.parts[stem], _QKV, per_group(arch.num_kv_heads, arch.head_dim)
    if stem == "mlp.up" and arch.gated and dialect.fused_gate:
        return dialect.fused_gate, _GATED, _HALVES
    return dialect.parts.get(stem), (stem,), _SAME


def per_group(groups: int, head_dim: int) -> Layout:
    """Rows [g, (n/g + 2) * d, ...]: the queries of a group, its key, its value; then the next group."""

    def split(x: Tensor) -> tuple[Tensor, ...]:
        rows = x.unflatten(0, (groups, -1))
        query, key, value = rows.split([rows.shape[1] - 2 * head_dim, head_dim, head_dim], 1)
        return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    return Layout(split=split, join=join)


def per_head_last(heads: int) -> Layout:
    """Rows [n, d, 3, ...] of version 1.0 of the format; every head has a key and a value of its own."""

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.flatten(0, 1) for part in x.unflatten(0, (heads, -1, 3)).unbind(2))

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 2).flatten(0, 2)

    return Layout(split=split, join=join)


THIRDS = Layout(split=lambda x: x.chunk(3), join=torch.cat)
"""Rows [3, n, d, ...] of version 0 of the format."""
