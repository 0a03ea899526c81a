"""Tiny random models of every family, and the comparison that the converters are held to: every bit equal."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron.checkpoint.formats.lazy import in_memory
from megatron.checkpoint.formats.model import StoredModel, parameter_shapes
from megatron.config.architecture import Architecture, RopeScaling
from megatron.config.experts import Experts

_LLAMA = Architecture(
    num_layers=4,
    hidden_size=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    ffn_hidden_size=48,
    vocab_size=83,
    padded_vocab_size=83,
    max_positions=64,
)
_GPT = {"norm": "layernorm", "activation": "gelu_tanh", "linear_bias": True, "tied_embeddings": True, "num_kv_heads": 8}

FAMILIES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "llama-3.2": replace(_LLAMA, tied_embeddings=True, rope_theta=5e5, rope_scaling=RopeScaling(factor=32.0)),
    "llama-biases": replace(_LLAMA, linear_bias=True, qkv_bias=False),
    "mistral": replace(_LLAMA, sliding_window=16, num_kv_heads=2),
    "mixtral": replace(_LLAMA, experts=Experts(count=4, topk=2, ffn_hidden_size=48, layers=(0, 1, 2, 3))),
    "qwen2": replace(_LLAMA, qkv_bias=True),
    "qwen3": replace(_LLAMA, qk_norm=True, head_dim=8),
    "bloom": replace(_LLAMA, position="alibi", embedding_norm=True, ffn_hidden_size=128, **_GPT),
    "gpt2": replace(_LLAMA, position="learned", **_GPT),
}
"""8 query heads; the vocabulary of 83 is no multiple of anything."""

MAIN_FAMILIES = ("llama", "mistral", "bloom", "gpt2")


def random_model(arch: Architecture, dtype: torch.dtype = torch.bfloat16, *, moments: bool = False) -> StoredModel:
    """A model in memory whose tensors are all different."""
    generator = torch.Generator().manual_seed(arch.num_layers)

    def draw(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(shape, generator=generator).to(dtype) for name, shape in parameter_shapes(arch).items()
        }

    weights = in_memory(draw(dtype))
    if not moments:
        return StoredModel(arch=arch, weights=weights)
    return StoredModel(
        arch=arch,
        weights=weights,
        moments={entry: in_memory(draw(torch.float32)) for entry in ("exp_avg", "exp_avg_sq")},
        steps=7,
        progress={"iteration": 7, "consumed_train_samples": 56, "consumed_train_tokens": 448},
    )


def assert_equal(found: StoredModel, expected: StoredModel) -> None:
    """The same tensors, to the bit, of the same architecture."""
    assert found.arch == expected.arch
    assert found.moments.keys() == expected.moments.keys()
    pairs = {"weights": (found.weights, expected.weights)}
    pairs |= {entry: (tensors, expected.moments[entry]) for entry, tensors in found.moments.items()}
    for what, (ours, theirs) in pairs.items():
        assert ours.records == theirs.records, what
        for name in theirs.records:
            assert torch.equal(ours.read(name), theirs.read(name)), (what, name)
