"""Small models and the comparisons that the model tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.config.architecture import Architecture, RopeScaling
from megatron.model.gpt import GPT, ModelInputs
from megatron.model.weights import initialise_parameters
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.groups import ProcessGroups, build_groups, single_process
from megatron.mpu.sharding import is_replicated_kv, kv_copies
from megatron.mpu.topology import Topology
from megatron.ops import Ops, reference_ops

SEED = 1234

_TINY = Architecture(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=83,
    padded_vocab_size=96,
    max_positions=32,
    init_std=0.2,
)
_GPT = {"norm": "layernorm", "activation": "gelu_tanh", "linear_bias": True, "tied_embeddings": True}

FAMILIES: dict[str, Architecture] = {
    "llama": replace(_TINY, num_kv_heads=2, rope_scaling=RopeScaling(factor=4.0, original_max_positions=16)),
    "gpt": replace(_TINY, position="learned", **_GPT),
    "bloom": replace(_TINY, position="alibi", embedding_norm=True, ffn_hidden_size=128, **_GPT),
    "qwen": replace(_TINY, num_kv_heads=1, qkv_bias=True, qk_norm=True, tied_embeddings=True),
    "variants": replace(
        _TINY,
        norm="layernorm",
        norm_1p=True,
        activation="geglu",
        linear_bias=True,
        rope_percent=0.5,
        rope_interleaved=True,
        residual_post_norm=True,
        fp32_residual=True,
        qk_layer_scaling=True,
        sliding_window=5,
    ),
}
"""Tensor-parallel degrees up to 4 divide these, with copies of key-value heads; the vocabulary is padded to 96 rows."""


def groups_for(arch: Architecture, topology: Topology) -> ProcessGroups:
    """The groups of this process, those of copied key-value heads included."""
    return build_groups(topology, "cpu", kv_copies=kv_copies(arch.num_kv_heads, topology.tp))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def gradient_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each gradient.

    The key bias of attention shifts all scores of a query alike, so that without rotary positions its gradient is zero
    but for rounding; it is measured against that of the key weight.
    """
    assert actual.keys() == expected.keys()
    errors = {}
    for name, gradient in expected.items():
        scale = expected[name.replace("key.bias", "key.weight")].abs().max().clamp_min(1e-30)
        errors[name] = ((actual[name] - gradient).abs().max() / scale).item()
    return errors


def build(arch: Architecture, groups: ProcessGroups | None = None, ops: Ops | None = None, **options: Any) -> GPT:
    """A model with the same weights on every layout; norms and biases are not just 1 and 0."""
    groups = groups or single_process()
    model = GPT(arch, ops=ops or reference_ops(), groups=groups, **options)
    initialise_parameters(model, arch, groups, SEED)
    perturb(model, groups)
    return model


def perturb(model: GPT, groups: ProcessGroups) -> None:
    """Move norms and biases (local tensors) away from 1 and 0, the same on every layout."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                logical = torch.arange(4096, dtype=parameter.dtype)
                split = name.endswith(("query.bias", "key.bias", "value.bias", "gate.bias", "up.bias"))
                copies = groups.kv_copies.size if groups.kv_copies else 1
                rank = groups.tp.rank // copies if is_replicated_kv(name, copies) else groups.tp.rank
                start = rank * parameter.numel() if split else 0
                parameter.add_(0.1 * torch.sin(logical[start : start + parameter.numel()] + len(name)))


def tokens_of(arch: Architecture, batch: int = 3, length: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both [b, s]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, arch.vocab_size, (batch, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def loss_of(model: GPT, arch: Architecture, groups: ProcessGroups, inputs: ModelInputs, seed: int = 0) -> Tensor:
    """Mean cross entropy of a fixed batch, on the device of the model."""
    device = next(model.parameters()).device
    tokens, labels = (ids.to(device) for ids in tokens_of(arch, seed=seed))
    logits = model(tokens, inputs)
    losses = vocab_parallel_cross_entropy(
        logits, labels.t(), vocab_size=arch.vocab_size, group=groups.tp, ops=reference_ops()
    )
    return losses.mean()
