"""Hugging Face `config.json` <-> Architecture, for the families whose maths this model shares.

Works on plain dictionaries; transformers itself is not needed. What cannot be expressed on the other side is refused:
a model that loads and computes something else would be worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from megatron.config.architecture import Activation, Architecture, RopeScaling
from megatron.config.experts import Experts

Family = Literal["llama", "mistral", "mixtral", "qwen2", "qwen3", "bloom", "gpt2"]

_CLASSES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "bloom": "BloomForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_GPT2_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}
_BLOOM_POSITIONS = 2048


def architecture_from_hf_config(config: Mapping[str, Any], *, padded_vocab_size: int | None = None) -> Architecture:
    """The architecture that a `config.json` describes.

    Args:
        config: contents of `config.json`, as written by transformers 4 or 5.
        padded_vocab_size: rows of the embedding here; None = the vocabulary unpadded.

    Raises:
        ValueError: for a model type or a setting that this model does not compute.
    """
    family = config.get("model_type")
    if family not in get_args(Family):
        raise ValueError(f"Hugging Face model_type is {family!r}; supported: {', '.join(get_args(Family))}")
    rows = padded_vocab_size or config["vocab_size"]
    if rows < config["vocab_size"]:
        raise ValueError(f"{rows} embedding rows cannot hold a vocabulary of {config['vocab_size']}")
    if family == "bloom":
        return _from_bloom(config, rows)
    return _from_gpt2(config, rows) if family == "gpt2" else _from_llama(config, rows)


def _from_llama(config: Mapping[str, Any], rows: int) -> Architecture:
    family: str = config["model_type"]
    _require(config, "hidden_act", ("silu",))
    bias = bool(config.get("attention_bias", False))
    if bias != bool(config.get("mlp_bias", False)) or (bias and family != "llama"):
        raise ValueError(
            "attention_bias without mlp_bias, or the reverse, is not supported; supported: both or neither"
        )
    heads = config["num_attention_heads"]
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    interpolation, scaling = _rope(rope)
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        padded_vocab_size=rows,
        max_positions=config["max_position_embeddings"],
        position="rope",
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_interpolation=interpolation,
        rope_scaling=scaling,
        norm="rmsnorm",
        norm_epsilon=config["rms_norm_eps"],
        activation="swiglu",
        linear_bias=bias,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_dropout=config.get("attention_dropout") or 0.0,
        sliding_window=_window(config),
        init_std=config.get("initializer_range", 0.02),
        experts=_experts(config) if family == "mixtral" else None,
    )


def _experts(config: Mapping[str, Any]) -> Experts:
    """Those of Mixtral: in every layer, and nothing beside them."""
    _require(config, "router_jitter_noise", (0, 0.0))
    return Experts(
        count=config["num_local_experts"],
        topk=config["num_experts_per_tok"],
        ffn_hidden_size=config["intermediate_size"],
        layers=tuple(range(config["num_hidden_layers"])),
    )


def _rope(rope: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(position interpolation, LLaMA 3.1 scaling) of a `rope_scaling` or `rope_parameters` entry."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; supported: 1.0")
    if kind == "default":
        return 1.0, None
    if kind == "linear":
        return float(rope["factor"]), None
    if kind == "llama3":
        return 1.0, RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"rope_type is {kind!r}; supported: default, linear, llama3")


def _window(config: Mapping[str, Any]) -> int | None:
    """Sliding window in tokens; it must hold for every layer or for none."""
    if not config.get("use_sliding_window", True) or config["model_type"] == "llama":
        return None
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1:
        raise ValueError(f"layer_types mixes {sorted(kinds)}; supported: the same for all layers")
    return None if kinds == {"full_attention"} else config.get("sliding_window")


def _from_bloom(config: Mapping[str, Any], rows: int) -> Architecture:
    hidden, heads = (
        config.get("hidden_size") or config["n_embed"],
        config.get("n_head") or config["num_attention_heads"],
    )
    return Architecture(
        num_layers=config.get("n_layer") or config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden_size=4 * hidden,
        vocab_size=config["vocab_size"],
        padded_vocab_size=rows,
        max_positions=config.get("seq_length", _BLOOM_POSITIONS),
        position="alibi",
        norm="layernorm",
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        linear_bias=True,
        embedding_norm=True,
        tied_embeddings=True,
        residual_post_norm=bool(config.get("apply_residual_connection_post_layernorm", False)),
        attention_dropout=config.get("attention_dropout", 0.0),
        hidden_dropout=config.get("hidden_dropout", 0.0),
        init_std=config.get("initializer_range", 0.02),
    )


def _from_gpt2(config: Mapping[str, Any], rows: int) -> Architecture:
    _require(config, "activation_function", tuple(_GPT2_ACTIVATIONS))
    _require(config, "scale_attn_weights", (True,))
    # scale_attn_by_inverse_layer_idx really divides the scores; Megatron's qk_layer_scaling does not.
    _require(config, "scale_attn_by_inverse_layer_idx", (False,))
    _require(config, "tie_word_embeddings", (True,))
    hidden, heads = config["n_embd"], config["n_head"]
    return Architecture(
        num_layers=config["n_layer"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden_size=config.get("n_inner") or 4 * hidden,
        vocab_size=config["vocab_size"],
        padded_vocab_size=rows,
        max_positions=config["n_positions"],
        position="learned",
        norm="layernorm",
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        activation=_GPT2_ACTIVATIONS[config.get("activation_function", "gelu_new")],
        linear_bias=True,
        tied_embeddings=True,
        attention_dropout=config.get("attn_pdrop", 0.1),
        hidden_dropout=config.get("resid_pdrop", 0.1),
        init_std=config.get("initializer_range", 0.02),
    )


def _require(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if key in config and config[key] not in allowed:
        raise ValueError(f"{key} is {config[key]!r}; supported: {', '.join(map(repr, allowed))}")


def family_of(arch: Architecture) -> Family:
    """The Hugging Face family that computes exactly this architecture.

    Raises:
        ValueError: if none does; the message names what stands in the way.
    """
    candidates: dict[str, Family] = {"alibi": "bloom", "learned": "gpt2"}
    family = candidates.get(arch.position) or _rotary_family(arch)
    try:
        described = architecture_from_hf_config(_config(arch, family), padded_vocab_size=arch.padded_vocab_size)
    except ValueError as error:
        raise ValueError(f"Hugging Face's {_CLASSES[family]} cannot express this architecture: {error}") from error
    plain = replace(arch, qkv_bias=arch.qkv_bias and not arch.linear_bias)
    different = [
        f"{name}={value!r}"
        for name, value in vars(plain).items()
        if name not in _NOT_EXPORTED and value != getattr(described, name) and _matters(name, arch)
    ]
    if different:
        raise ValueError(f"Hugging Face's {_CLASSES[family]} cannot express {', '.join(different)}")
    return family


# How a model is computed or trained, not what it computes.
_NOT_EXPORTED = frozenset(
    {
        "attention_dropout",
        "hidden_dropout",
        "qk_layer_scaling",
        "softmax_in_fp32",
        "fp32_residual",
        "init_method",
        "init_std",
        "embedding_init_std",
    }
)


def _matters(name: str, arch: Architecture) -> bool:
    return arch.position == "rope" or not name.startswith("rope_")


def _rotary_family(arch: Architecture) -> Family:
    if arch.experts is not None:
        return "mixtral"
    if arch.qk_norm:
        return "qwen3"
    if arch.qkv_bias and not arch.linear_bias:
        return "qwen2"
    return "mistral" if arch.sliding_window is not None else "llama"


def hf_config(arch: Architecture) -> dict[str, Any]:
    """The `config.json` of an architecture, readable by transformers 4 and 5; special token ids are left out.

    Raises:
        ValueError: if no supported family computes exactly this architecture.
    """
    return _config(arch, family_of(arch))


def _config(arch: Architecture, family: Family) -> dict[str, Any]:
    common = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": arch.vocab_size,
        "initializer_range": arch.init_std,
        "tie_word_embeddings": arch.tied_embeddings,
    }
    if family == "bloom":
        return {**common, **_bloom_config(arch)}
    return {**common, **(_gpt2_config(arch) if family == "gpt2" else _llama_config(arch, family))}


def _llama_config(arch: Architecture, family: Family) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_epsilon,
        "rope_theta": arch.rope_theta,
        "rope_scaling": _rope_scaling(arch),
        "attention_dropout": arch.attention_dropout,
    }
    if family == "llama":
        config.update(attention_bias=arch.linear_bias, mlp_bias=arch.linear_bias)
    else:
        config["sliding_window"] = arch.sliding_window
    if arch.experts is not None:
        config.update(num_local_experts=arch.experts.count, num_experts_per_tok=arch.experts.topk)
    if family in ("qwen2", "qwen3"):
        config.update(use_sliding_window=arch.sliding_window is not None, max_window_layers=0)
    return config


def _rope_scaling(arch: Architecture) -> dict[str, Any] | None:
    scaling = arch.rope_scaling
    if scaling is not None:
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {"rope_type": "linear", "factor": arch.rope_interpolation} if arch.rope_interpolation != 1.0 else None


def _bloom_config(arch: Architecture) -> dict[str, Any]:
    return {
        "hidden_size": arch.hidden_size,
        "n_layer": arch.num_layers,
        "n_head": arch.num_heads,
        "seq_length": arch.max_positions,
        "layer_norm_epsilon": arch.norm_epsilon,
        "apply_residual_connection_post_layernorm": arch.residual_post_norm,
        "attention_dropout": arch.attention_dropout,
        "hidden_dropout": arch.hidden_dropout,
    }


def _gpt2_config(arch: Architecture) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_GPT2_ACTIVATIONS.items())}
    return {
        "n_embd": arch.hidden_size,
        "n_inner": arch.ffn_hidden_size,
        "n_layer": arch.num_layers,
        "n_head": arch.num_heads,
        "n_positions": arch.max_positions,
        "layer_norm_epsilon": arch.norm_epsilon,
        "activation_function": names.get(arch.activation, arch.activation),
        "attn_pdrop": arch.attention_dropout,
        "embd_pdrop": arch.hidden_dropout,
        "resid_pdrop": arch.hidden_dropout,
    }
