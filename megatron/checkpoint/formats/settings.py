"""The settings of a run, as Megatron's checkpoints record them, that describe an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.config.architecture import Architecture
from megatron.config.derive import derive
from megatron.config.experts import expert_settings
from megatron.config.parser import defaults
from megatron.config.record import architecture_of, as_namespace, from_namespace

_POSITIONS = {"learned": "learned_absolute", "rope": "rope", "alibi": "alibi", "none": "none"}
# Rows of the embedding follow from the layout; how a layer is computed and initialised is not what a model is.
_NOT_COMPARED = frozenset({"padded_vocab_size", "softmax_in_fp32", "qk_layer_scaling", "embedding_init_std"})
# What a run may choose although it begins with given weights.
OF_THE_RUN = frozenset(
    {"vocab_size", "attention_dropout", "hidden_dropout", "init_std", "init_method", "fp32_residual"}
)


def settings_of(arch: Architecture) -> dict[str, Any]:
    """The values of the model's options (by Megatron's names) that describe an architecture.

    Raises:
        CheckpointError: the options cannot describe it; the message names what.
    """
    settings = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "max_position_embeddings": arch.max_positions,
        "position_embedding_type": _POSITIONS[arch.position],
        "rope_theta": int(arch.rope_theta),
        "rotary_percent": arch.rope_percent,
        "rotary_interleaved": arch.rope_interleaved,
        "rotary_seq_len_interpolation_factor": _whole_or_none(arch.rope_interpolation),
        "use_rope_scaling": arch.rope_scaling is not None,
        "rope_scaling_factor": arch.rope_scaling.factor if arch.rope_scaling else 8.0,
        "normalization": arch.norm,
        "layernorm_epsilon": arch.norm_epsilon,
        "apply_layernorm_1p": arch.norm_1p,
        "apply_residual_connection_post_layernorm": arch.residual_post_norm,
        "qk_layernorm": arch.qk_norm,
        "embed_layernorm": arch.embedding_norm,
        "activation": arch.activation,
        "add_bias_linear": arch.linear_bias,
        "add_qkv_bias": arch.qkv_bias,
        "untie_embeddings_and_output_weights": not arch.tied_embeddings,
        "attention_dropout": arch.attention_dropout,
        "hidden_dropout": arch.hidden_dropout,
        "window_size": arch.sliding_window,
        "fp32_residual_connection": arch.fp32_residual,
        "init_method_std": arch.init_std,
        "init_method_xavier_uniform": arch.init_method == "xavier_uniform",
    } | expert_settings(arch.experts, arch.num_layers)
    described = architecture_of(settings, arch.vocab_size)
    if different := differences(arch, described):
        raise CheckpointError(f"the options of this project cannot describe the model: {'; '.join(different)}")
    return settings


def _whole_or_none(factor: float) -> int | None:
    return None if factor == 1.0 else int(factor)


def differences(wanted: Architecture, found: Architecture, *, ignored: frozenset[str] = frozenset()) -> list[str]:
    """In what two architectures compute different things, or have parameters of different shapes."""
    return [
        f"{field.name} is {getattr(wanted, field.name)}, not {getattr(found, field.name)}"
        for field in fields(Architecture)
        if field.name not in _NOT_COMPARED | ignored and getattr(wanted, field.name) != getattr(found, field.name)
    ]


def complete_record(
    arch: Architecture, known: Mapping[str, Any], changes: Mapping[str, Any], *, tp: int = 1, pp: int = 1
) -> dict[str, Any]:
    """Megatron's record of a run: a value for every option.

    Args:
        arch: the model.
        known: what is known of the run, under Megatron's names; the architecture in it need not be complete.
        changes: values that replace those of `known`.
        tp, pp: layout that the record is to tell of.
    """
    layout = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "world_size": tp * pp,
        "padded_vocab_size": None,
    }
    settings = defaults() | from_namespace(known) | settings_of(arch) | layout | dict(changes)
    complete, _ = derive(settings, frozenset())
    # Without a word about it the tokenizer would be the default one, which is as good as any other.
    unknown = {} if settings["tokenizer_type"] else {"tokenizer_type": None}
    return as_namespace(complete, {}) | unknown


def architecture_from_record(record: Mapping[str, Any], vocab_size: int) -> Architecture:
    """The architecture in a record of Megatron or of this project, without padding of the vocabulary.

    Raises:
        CheckpointError: the record does not describe one.
    """
    try:
        return replace(architecture_of(record, vocab_size), padded_vocab_size=vocab_size)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the arguments in the checkpoint do not describe a model: {error}") from error
