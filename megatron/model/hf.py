"""Hugging Face weights <-> logical weights: which tensors correspond, and how one is laid out in the other.

Pure functions on dictionaries of whole (unsharded) tensors; transformers itself is not needed.
Legend: h=hidden, n=query heads, g=kv heads, d=head dim, f=ffn, v=vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.architecture import Architecture
from megatron.model.hf_config import Family, family_of

_VOCABULARY = ("embedding.word.weight", "head.weight")


@dataclass(frozen=True)
class Layout:
    """How the tensor of Hugging Face is made of logical ones.

    Attributes:
        split: Hugging Face's tensor -> the logical tensors.
        join: the inverse.
    """

    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of Hugging Face and the logical tensors it holds."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


def _transpose(x: Tensor) -> Tensor:
    """GPT-2's Conv1D stores [in, out]; a bias stays as it is."""
    return x.t().contiguous() if x.dim() == 2 else x


_SAME = Layout(split=lambda x: (x,), join=lambda parts: parts[0])
_HALVES = Layout(
    split=lambda x: tuple(part.contiguous() for part in x.chunk(2, dim=1)), join=lambda parts: torch.cat(parts, dim=1)
)
"""Gate and up-projection of experts [E, 2f, h]."""
_FUSED_EXPERTS = ".mlp.experts.gate_up_proj"
_TRANSPOSED = Layout(split=lambda x: (_transpose(x),), join=lambda parts: _transpose(parts[0]))
_TRANSPOSED_THIRDS = Layout(
    split=lambda x: tuple(part.contiguous() for part in _transpose(x).chunk(3)),
    join=lambda parts: _transpose(torch.cat(parts)),
)


def _per_head_thirds(heads: int) -> Layout:
    """BLOOM's fused rows [n, 3, d, ...]: query, key, value of the first head, then of the second, ..."""
    return Layout(
        split=lambda x: tuple(part.flatten(0, 1) for part in x.unflatten(0, (heads, 3, -1)).unbind(1)),
        join=lambda parts: torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2),
    )


def entries(arch: Architecture, *, fused: bool = False) -> list[Entry]:
    """All tensors of the model, in the order of the layers.

    Experts have tensors of their own in files, of which the logical names are those of `stacks` with the number of the
    expert behind.

    Args:
        arch: of the model.
        fused: the names and tensors that experts have in the memory of transformers 5: all of a layer together.

    Raises:
        ValueError: if no supported Hugging Face family computes this architecture.
    """
    family = family_of(arch)
    if family == "bloom":
        return _bloom(arch)
    return _gpt2(arch) if family == "gpt2" else _llama(arch, family, fused)


def is_fused(names: Iterable[str]) -> bool:
    """Whether tensors with these names hold all experts of a layer together, see `entries`."""
    return any(name.endswith(_FUSED_EXPERTS) for name in names)


def stacks(arch: Architecture) -> dict[str, int]:
    """Logical tensors that hold a tensor for each of several experts, and their number.

    Args:
        arch: of a model without biases in its experts.
    """
    if arch.experts is None:
        return {}
    parts = ("gate", "up", "down") if arch.gated else ("up", "down")
    return {
        f"layers.{layer}.mlp.experts.{part}.weight": arch.experts.count
        for layer in arch.experts.layers
        for part in parts
    }


def _experts(arch: Architecture, layer: int, fused: bool) -> list[Entry]:
    """Router and experts of a layer of Mixtral."""
    assert arch.experts is not None
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}.mlp"
    gate, up, down = (f"{ours}.experts.{part}.weight" for part in ("gate", "up", "down"))
    if fused:
        return [
            Entry(f"{theirs}.mlp.gate.weight", (f"{ours}.router.weight",), _SAME),
            Entry(f"{theirs}{_FUSED_EXPERTS}", (gate, up), _HALVES),
            Entry(f"{theirs}.mlp.experts.down_proj", (down,), _SAME),
        ]
    block = f"{theirs}.block_sparse_moe"
    return [
        Entry(f"{block}.gate.weight", (f"{ours}.router.weight",), _SAME),
        *(
            Entry(f"{block}.experts.{expert}.{name}.weight", (f"{stacked}.{expert}",), _SAME)
            for name, stacked in (("w1", gate), ("w2", down), ("w3", up))
            for expert in range(arch.experts.count)
        ),
    ]


def _llama(arch: Architecture, family: Family, fused: bool) -> list[Entry]:
    names = {
        "input_layernorm.weight": "attention_norm.weight",
        "self_attn.q_proj.weight": "attention.query.weight",
        "self_attn.k_proj.weight": "attention.key.weight",
        "self_attn.v_proj.weight": "attention.value.weight",
        "self_attn.o_proj.weight": "attention.output.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
        "mlp.gate_proj.weight": "mlp.gate.weight",
        "mlp.up_proj.weight": "mlp.up.weight",
        "mlp.down_proj.weight": "mlp.down.weight",
    }
    if arch.linear_bias or arch.qkv_bias:
        biased = ("q_proj", "k_proj", "v_proj", *(("o_proj", "mlp.") if arch.linear_bias else ()))
        names.update(
            {
                theirs.replace("weight", "bias"): ours.replace("weight", "bias")
                for theirs, ours in list(names.items())
                if any(part in theirs for part in biased)
            }
        )
    if family == "qwen3":
        names["self_attn.q_norm.weight"] = "attention.query_norm.weight"
        names["self_attn.k_norm.weight"] = "attention.key_norm.weight"
    table = [Entry("model.embed_tokens.weight", ("embedding.word.weight",), _SAME)]
    for layer in range(arch.num_layers):
        table += [
            Entry(f"model.layers.{layer}.{theirs}", (f"layers.{layer}.{ours}",), _SAME)
            for theirs, ours in names.items()
            if not (arch.has_experts(layer) and ours.startswith("mlp."))
        ]
        if arch.has_experts(layer):
            table += _experts(arch, layer, fused)
    table.append(Entry("model.norm.weight", ("final_norm.weight",), _SAME))
    if not arch.tied_embeddings:
        table.append(Entry("lm_head.weight", ("head.weight",), _SAME))
    return table


def _bloom(arch: Architecture) -> list[Entry]:
    names = {
        "input_layernorm": "attention_norm",
        "self_attention.dense": "attention.output",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up",
        "mlp.dense_4h_to_h": "mlp.down",
    }
    fused = _per_head_thirds(arch.num_heads)
    table = [Entry("transformer.word_embeddings.weight", ("embedding.word.weight",), _SAME)]
    table += _weight_and_bias("transformer.word_embeddings_layernorm", ("embedding.norm",), _SAME)
    for layer in range(arch.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"layers.{layer}"
        table += _weight_and_bias(f"{theirs}.self_attention.query_key_value", _qkv(ours), fused)
        for name, logical in names.items():
            table += _weight_and_bias(f"{theirs}.{name}", (f"{ours}.{logical}",), _SAME)
    return table + _weight_and_bias("transformer.ln_f", ("final_norm",), _SAME)


def _gpt2(arch: Architecture) -> list[Entry]:
    names = {
        "ln_1": ("attention_norm", _SAME),
        "attn.c_proj": ("attention.output", _TRANSPOSED),
        "ln_2": ("mlp_norm", _SAME),
        "mlp.c_fc": ("mlp.up", _TRANSPOSED),
        "mlp.c_proj": ("mlp.down", _TRANSPOSED),
    }
    table = [
        Entry("transformer.wte.weight", ("embedding.word.weight",), _SAME),
        Entry("transformer.wpe.weight", ("embedding.position.weight",), _SAME),
    ]
    for layer in range(arch.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"layers.{layer}"
        table += _weight_and_bias(f"{theirs}.attn.c_attn", _qkv(ours), _TRANSPOSED_THIRDS)
        for name, (logical, layout) in names.items():
            table += _weight_and_bias(f"{theirs}.{name}", (f"{ours}.{logical}",), layout)
    return table + _weight_and_bias("transformer.ln_f", ("final_norm",), _SAME)


def _qkv(layer: str) -> tuple[str, ...]:
    return tuple(f"{layer}.attention.{part}" for part in ("query", "key", "value"))


def _weight_and_bias(theirs: str, ours: tuple[str, ...], layout: Layout) -> list[Entry]:
    return [Entry(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours), layout) for kind in ("weight", "bias")]


def from_hf(state: Mapping[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """Logical tensors from the state dict of a Hugging Face model.

    Args:
        state: name -> tensor, as saved by transformers; names may lack the leading "transformer.", as those of the
            published BLOOM and GPT-2 weights do. Tensors of any dtype, which is kept.
        arch: of the model, see `architecture_from_hf_config`.

    Returns:
        Logical name -> tensor; vocabulary rows from vocab_size to padded_vocab_size are zero.

    Raises:
        ValueError: if tensors are missing or left over.
    """
    stored, fused = stored_names(state, arch), is_fused(state)
    result: dict[str, Tensor] = {}
    for entry in entries(arch, fused=fused):
        result.update(zip(entry.ours, entry.layout.split(state[stored[entry.theirs]]), strict=True))
    for name, count in ({} if fused else stacks(arch)).items():
        result[name] = torch.stack([result.pop(f"{name}.{number}") for number in range(count)])
    for name in set(_VOCABULARY) & result.keys():
        rows = result[name]
        result[name] = torch.cat((rows, rows.new_zeros(arch.padded_vocab_size - rows.shape[0], rows.shape[1])))
    return result


def to_hf(state: Mapping[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """The state dict of a Hugging Face model from logical tensors; the inverse of `from_hf`.

    A tied head is left out: transformers ties it again when loading. Experts are as in files, see `entries`.

    Raises:
        ValueError: if no supported family computes this architecture.
        KeyError: for a missing tensor.
    """
    real = {name: rows[: arch.vocab_size] if name in _VOCABULARY else rows for name, rows in state.items()}
    for name in stacks(arch):
        real.update({f"{name}.{number}": part for number, part in enumerate(real.pop(name))})
    return {entry.theirs: entry.layout.join(tuple(real[name] for name in entry.ours)) for entry in entries(arch)}


def stored_names(names: Iterable[str], arch: Architecture) -> dict[str, str]:
    """What each tensor of `entries` is called among `names`, which may lack the leading "transformer.".

    Raises:
        ValueError: if tensors are missing or left over.
    """
    stored = {_full_name(name, arch): name for name in names if not _is_derived(name, arch)}
    expected = {entry.theirs for entry in entries(arch, fused=is_fused(stored))}
    missing, unknown = sorted(expected - stored.keys()), sorted(stored.keys() - expected)
    if missing or unknown:
        raise ValueError(f"weights do not fit the configuration: missing {missing[:5]}, unknown {unknown[:5]}")
    return stored


def _full_name(name: str, arch: Architecture) -> str:
    bare = arch.position in ("alibi", "learned") and not name.startswith(("transformer.", "lm_head."))
    return f"transformer.{name}" if bare else name


def _is_derived(name: str, arch: Architecture) -> bool:
    """Tensors that repeat or follow from others: a tied head, rotary frequencies, GPT-2's causal masks."""
    derived = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
    return name.endswith(derived) or (arch.tied_embeddings and name == "lm_head.weight")
