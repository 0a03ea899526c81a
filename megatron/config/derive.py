"""The settings that nobody gave, computed from those that were given, as Megatron's `validate_args` does.

Each function takes all settings (name -> value, None where unknown) and returns the ones it knows more about.
A function that lacks what it needs leaves its result unknown: `rules` reports what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config import pipeline
from megatron.config.architecture import Architecture, Position, RopeScaling
from megatron.config.experts import experts_of
from megatron.config.phases import phases
from megatron.config.presets import PRESETS

Settings = Mapping[str, Any]
Changes = dict[str, Any]

_GATED = ("swiglu", "geglu")


def derive(settings: Settings, given: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """Fill in what follows from the rest.

    Args:
        settings: every setting, `world_size` included.
        given: names of those that were given explicitly.

    Returns:
        All settings, and one line for the start-up log per given setting that has no effect here.
    """
    complete = dict(settings)
    for step in (_layout, _pipeline, _sizes, _activation, _precision, _batch, _length, _experts, _small):
        complete |= {name: value for name, value in step(complete).items() if value is not None}
    complete["zero_stage_native"] = complete["zero_stage"] if "zero_stage" in given else 0
    if "distributed_backend" not in given:
        complete["distributed_backend"] = None
    changes, notes = _moot(complete, given)
    return complete | changes, notes


def _layout(s: Settings) -> Changes:
    model_ranks = 1
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        model_ranks *= s[name]
    ulysses, context = s["ds_sequence_parallel_size"], s["context_parallel_size"]
    by_heads = s["cp_comm_type"] == "a2a"
    return {
        "data_parallel_size": max(1, s["world_size"] // (model_ranks * ulysses)),
        "ring_parallel_size": 1 if by_heads else context,
        "ulysses_parallel_size": ulysses * context if by_heads else ulysses,
    }


def _pipeline(s: Settings) -> Changes:
    if s["num_layers"] is None:
        return {}
    try:
        found = pipeline.split(s)
    except pipeline.PipelineError:
        return {}
    return {
        "pipeline_schedule": found.schedule,
        "virtual_pipeline_model_parallel_size": found.chunks,
        "pipeline_stage_layers": found.layers,
    }


def _sizes(s: Settings) -> Changes:
    hidden, heads = s["hidden_size"], s["num_attention_heads"]
    changes: Changes = {}
    if s["kv_channels"] is None and hidden and heads and hidden % heads == 0:
        changes["kv_channels"] = hidden // heads
    if s["num_key_value_heads"] is None:
        changes["num_key_value_heads"] = heads
    kv_heads = s["num_key_value_heads"] or heads
    if s["kv_replicator"] is None and kv_heads:
        changes["kv_replicator"] = max(1, s["tensor_model_parallel_size"] // kv_heads)
    if s["max_position_embeddings"] is None:
        changes["max_position_embeddings"] = s["seq_length"]
    if s["position_embedding_type"] is None:
        changes["position_embedding_type"] = "learned_absolute"
    return changes


def _activation(s: Settings) -> Changes:
    # Megatron's fused kernel adds a bias and approximates GELU by tanh; without the kernel it is exact.
    default = "gelu_tanh" if s["bias_gelu_fusion"] and s["add_bias_linear"] else "gelu"
    activation = s["activation"] or default
    ffn = s["ffn_hidden_size"]
    if ffn is None and s["hidden_size"]:
        ffn = 4 * s["hidden_size"]
        if activation in _GATED:
            ffn = int(ffn * 2 / 3) // 64 * 64
    return {"activation": activation, "ffn_hidden_size": ffn}


def _precision(s: Settings) -> Changes:
    dtype = "float16" if s["fp16"] else "bfloat16" if s["bf16"] else "float32"
    in_fp32 = s["accumulate_allreduce_grads_in_fp32"] or (s["bf16"] and not s["grad_reduce_in_bf16"])
    return {
        "params_dtype": dtype,
        "accumulate_allreduce_grads_in_fp32": in_fp32,
        # It keeps scores within the range of float16; other formats have room.
        "apply_query_key_layer_scaling": s["apply_query_key_layer_scaling"] and s["fp16"],
    }


def _batch(s: Settings) -> Changes:
    changes: Changes = {}
    micro = s["micro_batch_size"]
    if micro and s["global_batch_size"] is None:
        scheduled = s["scheduler_batch_size"]
        changes["global_batch_size"] = scheduled[-1] if scheduled else micro * s["data_parallel_size"]
    if s["eval_micro_batch_size"] is None:
        changes["eval_micro_batch_size"] = micro
    return changes


def _length(s: Settings) -> Changes:
    """The length of the run: a limit in tokens becomes one in samples or iterations, and samples become iterations."""
    tokens, length, batch, samples = s["train_tokens"], s["seq_length"], s["global_batch_size"], s["train_samples"]
    if tokens and not (length and batch):
        return {}
    limit = -(-tokens // length) if tokens else None
    if s["train_iters"] is not None:
        return {"train_iters": min(s["train_iters"], -(-limit // batch)) if limit else None}
    if samples is None and limit is None:
        return {"train_iters": 0 if s["skip_train"] else None}
    samples = min(number for number in (samples, limit) if number is not None)
    return {"train_samples": samples, "train_iters": _iterations(samples, batch, s)}


def _iterations(samples: int, batch: int | None, s: Settings) -> int | None:
    """How many whole steps the samples are enough for; None if the batch or how it grows makes no sense."""
    if not batch:
        return None
    starts, sizes = s["batch_sched_samples"], s["scheduler_batch_size"]
    if starts and sizes and len(starts) == len(sizes):
        # The length of samples is of no matter here.
        parts = phases(sizes, starts, None, 1)
        return parts.iterations(samples) if parts else None
    ramp_up = s["rampup_batch_size"]
    if ramp_up is None:
        return samples // batch
    try:
        start, increment, length = (int(word) for word in ramp_up)
        steps = (batch - start) // increment
    except (ValueError, ZeroDivisionError):
        return None
    consumed = count = 0
    while start > 0 and length > 0 and steps > 0 and consumed <= length:
        size = start + increment * (consumed * steps // length)
        if consumed + size > samples:
            return count
        consumed, count = consumed + size, count + 1
    return count + (samples - consumed) // batch


def _experts(s: Settings) -> Changes:
    """Megatron-LM's capacity factor, of which experts without one take any number of tokens."""
    changes: Changes = {
        "expert_tensor_parallel_size": s["expert_tensor_parallel_size"] or s["tensor_model_parallel_size"]
    }
    factor = s["moe_expert_capacity_factor"]
    if factor is None:
        return changes
    changes |= {"moe_train_capacity_factor": factor, "moe_eval_capacity_factor": factor}
    return changes | {"moe_token_dropping": True}


def _small(s: Settings) -> Changes:
    """Defaults that depend on one other setting."""
    listed = s["recomputation_layer_num"] is not None
    granularity = s["recompute_granularity"] or ("full" if listed else None)
    tokenizer = s["tokenizer_type"] or ("NullTokenizer" if s["mock_data"] else "GPT2BPETokenizer")
    vocab_size = s["vocab_size"]
    if tokenizer == "NullTokenizer" and vocab_size is None and s["preset"] in PRESETS:
        # Without an id for it, the token that ends documents is one more.
        vocab_size = PRESETS[s["preset"]].vocab_size - (s["null_tokenizer_eod_id"] is None)
    return {
        "tokenizer_type": tokenizer,
        "vocab_size": vocab_size,
        "dataloader_type": s["dataloader_type"] or "single",
        "start_weight_decay": s["weight_decay"] if s["start_weight_decay"] is None else s["start_weight_decay"],
        "end_weight_decay": s["weight_decay"] if s["end_weight_decay"] is None else s["end_weight_decay"],
        "recompute_granularity": granularity,
        "recompute_method": s["recompute_method"]
        or ({True: "block", False: "uniform"}[listed] if granularity == "full" else None),
        "lr": 0.0 if s["lr"] is None and s["skip_train"] else s["lr"],
    }


def _moot(s: Settings, given: frozenset[str]) -> tuple[Changes, list[str]]:
    """Given settings that mean nothing beside the others, as in Megatron; each is said once."""
    changes: Changes = {}
    notes: list[str] = []
    if s["sequence_parallel"] and s["tensor_model_parallel_size"] == 1:
        changes["sequence_parallel"] = False
        notes.append("--sequence-parallel has no effect: one tensor-parallel rank has the whole sequence")
    if not s["masked_softmax_fusion"] and s["attention_backend"] in ("flash", "fused"):
        changes["masked_softmax_fusion"] = True
        notes.append(
            f"--no-masked-softmax-fusion has no effect: --attention-backend {s['attention_backend']} has no such kernel"
        )
    return changes, notes


def architecture(s: Settings, vocab_size: int) -> Architecture:
    """The model that complete settings describe.

    Raises:
        ValueError: --padded-vocab-size is smaller than `vocab_size`.
    """
    positions: dict[str, Position] = {"learned_absolute": "learned", "rope": "rope", "alibi": "alibi", "none": "none"}
    return Architecture(
        num_layers=s["num_layers"],
        hidden_size=s["hidden_size"],
        num_heads=s["num_attention_heads"],
        num_kv_heads=s["num_key_value_heads"],
        head_dim=s["kv_channels"],
        ffn_hidden_size=s["ffn_hidden_size"],
        vocab_size=vocab_size,
        padded_vocab_size=_padded(s, vocab_size),
        max_positions=s["max_position_embeddings"],
        position=positions[s["position_embedding_type"]],
        rope_theta=float(s["rope_theta"]),
        rope_percent=s["rotary_percent"],
        rope_interleaved=s["rotary_interleaved"],
        rope_interpolation=float(s["rotary_seq_len_interpolation_factor"] or 1),
        rope_scaling=RopeScaling(factor=s["rope_scaling_factor"]) if s["use_rope_scaling"] else None,
        norm=s["normalization"],
        norm_epsilon=s["layernorm_epsilon"],
        norm_1p=s["apply_layernorm_1p"],
        activation=s["activation"],
        linear_bias=s["add_bias_linear"],
        qkv_bias=s["add_qkv_bias"],
        embedding_norm=s["embed_layernorm"],
        tied_embeddings=not s["untie_embeddings_and_output_weights"],
        qk_norm=s["qk_layernorm"],
        residual_post_norm=s["apply_residual_connection_post_layernorm"],
        attention_dropout=s["attention_dropout"],
        hidden_dropout=s["hidden_dropout"],
        qk_layer_scaling=s["apply_query_key_layer_scaling"],
        sliding_window=s["window_size"],
        fp32_residual=s["fp32_residual_connection"],
        init_method="xavier_uniform" if s["init_method_xavier_uniform"] else "normal",
        init_std=s["init_method_std"],
        embedding_init_std=s["embedding_init_method_std"],
        experts=experts_of(s),
    )


def _padded(s: Settings, vocab_size: int) -> int:
    """Rows of the embedding."""
    rows = s["padded_vocab_size"]
    if rows is not None:
        if rows < vocab_size:
            raise ValueError(f"--padded-vocab-size {rows}: must be at least {vocab_size}, the tokens of the tokenizer")
        return int(rows)
    if not s["pad_vocab_size"]:
        return vocab_size
    multiple = s["make_vocab_size_divisible_by"] * s["tensor_model_parallel_size"]
    return int(-(-vocab_size // multiple) * multiple)
