"""Published models: the only place with their numbers.

A preset is architecture alone. Learning rates, batch sizes and sequence lengths belong to a run, not to a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published model."""

    settings: Mapping[str, Any]  # values of the fields of ModelConfig and MoeConfig
    vocab_size: int  # rows of the published embedding
    num_parameters: int | None  # as published; None where no exact number was
    source: str


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"the nearest is {near[0]}" if near else "known: " + ", ".join(PRESETS)
    raise ValueError(f"--preset {name}: no such preset; {hint}")


def _sizes(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, positions: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "ffn_hidden_size": ffn,
        "max_position_embeddings": positions,
    }


_LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "apply_query_key_layer_scaling": False,
}
_GPT2 = {
    "position_embedding_type": "learned_absolute",
    "normalization": "layernorm",
    "activation": "gelu_tanh",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}
_BLOOM = _GPT2 | {
    "position_embedding_type": "alibi",
    "embed_layernorm": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def _llama(sizes: dict[str, Any], vocab_size: int, num_parameters: int | None, source: str, **settings: Any) -> Preset:
    return Preset(
        settings={**_LLAMA, **sizes, **settings}, vocab_size=vocab_size, num_parameters=num_parameters, source=source
    )


def _llama3(sizes: dict[str, Any], num_parameters: int, source: str, **settings: Any) -> Preset:
    return _llama(sizes, 128256, num_parameters, source, rope_theta=500000, **settings)


def _mixtral(sizes: dict[str, Any], experts: int, vocab_size: int, num_parameters: int | None, source: str) -> Preset:
    settings = {
        "num_experts": (experts,),
        "topk": 2,
        "expert_interval": 1,
        "moe_token_dropping": False,
        "moe_top2_2nd_expert_sampling": False,
    }
    return _llama(sizes, vocab_size, num_parameters, source, rope_theta=1000000, **settings)


def _gpt2(
    layers: int, hidden: int, heads: int, num_parameters: int | None, source: str, vocab_size: int = 50257
) -> Preset:
    settings = _GPT2 | _sizes(layers, hidden, heads, heads, 4 * hidden, 1024)
    return Preset(settings=settings, vocab_size=vocab_size, num_parameters=num_parameters, source=source)


def _bloom(
    layers: int, hidden: int, heads: int, num_parameters: int | None, source: str, vocab_size: int = 250880
) -> Preset:
    settings = _BLOOM | _sizes(layers, hidden, heads, heads, 4 * hidden, 2048)
    return Preset(settings=settings, vocab_size=vocab_size, num_parameters=num_parameters, source=source)


_LLAMA1_PAPER = "LLaMA: Open and Efficient Foundation Language Models (2023)"
_LLAMA2_PAPER = "Llama 2: Open Foundation and Fine-Tuned Chat Models (2023)"
_GPT2_PAPER = "Language Models are Unsupervised Multitask Learners (2019)"
_TINY = "for tests"

PRESETS: Mapping[str, Preset] = {
    "gpt2": _gpt2(12, 768, 12, 124439808, _GPT2_PAPER),
    "gpt2-medium": _gpt2(24, 1024, 16, 354823168, _GPT2_PAPER),
    "gpt2-large": _gpt2(36, 1280, 20, 774030080, _GPT2_PAPER),
    "gpt2-xl": _gpt2(48, 1600, 25, 1557611200, _GPT2_PAPER),
    "llama1-7b": _llama(
        _sizes(32, 4096, 32, 32, 11008, 2048), 32000, 6738415616, _LLAMA1_PAPER, layernorm_epsilon=1e-6
    ),
    "llama1-13b": _llama(
        _sizes(40, 5120, 40, 40, 13824, 2048), 32000, 13015864320, _LLAMA1_PAPER, layernorm_epsilon=1e-6
    ),
    "llama1-30b": _llama(
        _sizes(60, 6656, 52, 52, 17920, 2048), 32000, 32528943616, _LLAMA1_PAPER, layernorm_epsilon=1e-6
    ),
    "llama1-65b": _llama(_sizes(80, 8192, 64, 64, 22016, 2048), 32000, 65285660672, _LLAMA1_PAPER),
    "llama2-7b": _llama(_sizes(32, 4096, 32, 32, 11008, 4096), 32000, 6738415616, _LLAMA2_PAPER),
    "llama2-13b": _llama(_sizes(40, 5120, 40, 40, 13824, 4096), 32000, 13015864320, _LLAMA2_PAPER),
    # Its weights were published as Code Llama 34B, which has the same shape.
    "llama2-34b": _llama(_sizes(48, 8192, 64, 8, 22016, 4096), 32000, 33743970304, _LLAMA2_PAPER),
    "llama2-70b": _llama(_sizes(80, 8192, 64, 8, 28672, 4096), 32000, 68976648192, _LLAMA2_PAPER),
    "llama3-8b": _llama3(_sizes(32, 4096, 32, 8, 14336, 8192), 8030261248, "model card of Meta-Llama-3-8B (2024)"),
    "llama3-70b": _llama3(_sizes(80, 8192, 64, 8, 28672, 8192), 70553706496, "model card of Meta-Llama-3-70B (2024)"),
    "llama3.1-8b": _llama3(
        _sizes(32, 4096, 32, 8, 14336, 131072), 8030261248, "The Llama 3 Herd of Models (2024)", use_rope_scaling=True
    ),
    "llama3.1-70b": _llama3(
        _sizes(80, 8192, 64, 8, 28672, 131072), 70553706496, "The Llama 3 Herd of Models (2024)", use_rope_scaling=True
    ),
    "llama3.1-405b": _llama3(
        _sizes(126, 16384, 128, 8, 53248, 131072),
        405853388800,
        "The Llama 3 Herd of Models (2024)",
        use_rope_scaling=True,
    ),
    "llama3.2-1b": _llama3(
        _sizes(16, 2048, 32, 8, 8192, 131072),
        1235814400,
        "model card of Llama-3.2-1B (2024)",
        use_rope_scaling=True,
        rope_scaling_factor=32.0,
        untie_embeddings_and_output_weights=False,
    ),
    "llama3.2-3b": _llama3(
        _sizes(28, 3072, 24, 8, 8192, 131072),
        3212749824,
        "model card of Llama-3.2-3B (2024)",
        use_rope_scaling=True,
        rope_scaling_factor=32.0,
        untie_embeddings_and_output_weights=False,
    ),
    "mistral-7b": _llama(
        _sizes(32, 4096, 32, 8, 14336, 32768), 32000, 7241732096, "Mistral 7B (2023), version 0.1", window_size=4096
    ),
    "mixtral-8x7b": _mixtral(
        _sizes(32, 4096, 32, 8, 14336, 32768), 8, 32000, 46702792704, "Mixtral of Experts (2024), version 0.1"
    ),
    "mixtral-small": _mixtral(
        _sizes(8, 768, 16, 8, 3072, 32768), 4, 32000, None, "run_mixtral.sh of Intel's Megatron-DeepSpeed"
    ),
    "bloom-560m": _bloom(24, 1024, 16, 559214592, "model card of bigscience/bloom-560m (2022)"),
    "bloom-1b1": _bloom(24, 1536, 16, 1065314304, "model card of bigscience/bloom-1b1 (2022)"),
    "bloom-1b7": _bloom(24, 2048, 16, 1722408960, "model card of bigscience/bloom-1b7 (2022)"),
    "bloom-3b": _bloom(30, 2560, 32, 3002557440, "model card of bigscience/bloom-3b (2022)"),
    "bloom-7b1": _bloom(30, 4096, 32, 7069016064, "model card of bigscience/bloom-7b1 (2022)"),
    "bloom-13b": _bloom(40, 5120, 32, None, "run_bloom13b.sh of Intel's Megatron-DeepSpeed examples", vocab_size=50257),
    "bloom-176b": _bloom(70, 14336, 112, 176247271424, "BLOOM: A 176B-Parameter Open-Access Language Model (2022)"),
    "llama-tiny": _llama(_sizes(2, 64, 4, 2, 128, 256), 512, None, _TINY),
    "mixtral-tiny": _mixtral(_sizes(2, 64, 4, 2, 96, 256), 4, 512, None, _TINY),
    "gpt-tiny": Preset(
        settings=_GPT2 | _sizes(2, 64, 4, 4, 256, 256), vocab_size=512, num_parameters=None, source=_TINY
    ),
    "bloom-tiny": Preset(
        settings=_BLOOM | _sizes(2, 64, 4, 4, 256, 256), vocab_size=512, num_parameters=None, source=_TINY
    ),
    "llama-mini": _llama(
        _sizes(6, 320, 10, 2, 896, 2048),
        16384,
        None,
        "for examples that run on a CPU",
        untie_embeddings_and_output_weights=False,
    ),
}
