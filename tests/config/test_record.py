"""The record that checkpoints keep."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.config import record
from tests.config.commands import config

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "megatron_deepspeed_flags.json").read_text())


def test_it_has_every_option_of_megatron_deepspeed():
    saved = config().as_namespace()
    assert {row["dest"] for row in GOLDEN} - saved.keys() == {"local_rank"}, "it depends on the rank"


def test_it_survives_json():
    saved = config("--op", "a=b", "--num-experts", "1").as_namespace()
    assert json.loads(json.dumps(saved)) == saved
    assert list(saved) == sorted(saved)


def test_it_is_read_back():
    run = config("--swiglu", "--bf16", "--iterations-to-skip", "3", "4", "--use-flash-attn", "--no-save-optim")
    settings = record.from_namespace(run.as_namespace())
    kept = {name: value for name, value in run.values().items() if value is not None and name in settings}
    assert settings == kept
    computed = {"world_size", "data_parallel_size", "local_rank", "params_dtype", "zero_stage_native"}
    computed |= {"pipeline_stage_layers", "virtual_pipeline_model_parallel_size"}
    computed |= {"ring_parallel_size", "ulysses_parallel_size"}
    assert {name for name, value in run.values().items() if value is not None} - settings.keys() == computed


def test_flags_of_other_names_are_in_it():
    saved = config("--swiglu", "--use-rotary-position-embeddings", "--num-query-groups", "2").as_namespace()
    assert saved["swiglu"] is True
    assert saved["squared_relu"] is False
    assert saved["use_rotary_position_embeddings"] is True
    assert saved["add_position_embedding"] is True
    assert saved["group_query_attention"] is True
    assert saved["use_distributed_optimizer"] is False
    assert config("--use-distributed-optimizer").as_namespace()["use_distributed_optimizer"] is True
    assert config("--no-position-embedding").as_namespace()["add_position_embedding"] is False


def test_options_without_effect_keep_their_value():
    assert config("--data-impl", "mmap").as_namespace()["data_impl"] == "mmap"
    assert config().as_namespace()["data_impl"] == "infer"


def test_the_model_of_a_run_is_in_its_record():
    run = config(
        "--swiglu", "--normalization", "rmsnorm", "--use-rotary-position-embeddings", "--num-query-groups", "2"
    )
    saved = json.loads(json.dumps(run.as_namespace()))
    assert record.architecture_of(saved, 500) == run.architecture(500)


def test_a_record_of_megatron_lm():
    args = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 160,
        "group_query_attention": False,
        "num_query_groups": 1,
        "kv_channels": 16,
        "seq_length": 32,
        "max_position_embeddings": 64,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "attention_backend": object(),
        "window_size": None,
    }
    arch = record.architecture_of(args, 100)
    assert (arch.num_kv_heads, arch.rope_theta, arch.norm, arch.norm_epsilon) == (4, 500000.0, "rmsnorm", 1e-6)
    assert (arch.activation, arch.position, arch.linear_bias, arch.tied_embeddings) == ("swiglu", "rope", False, False)
    grouped = record.architecture_of(args | {"group_query_attention": True, "num_query_groups": 2}, 100)
    assert grouped.num_kv_heads == 2


def test_a_record_of_megatron_deepspeed():
    args = {row["dest"]: row["default"] for row in GOLDEN}
    args |= {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "use_rotary_position_embeddings": True,
        "add_position_embedding": False,
        "swiglu": True,
        "num_key_value_heads": 2,
    }
    arch = record.architecture_of(args, 100)
    assert (arch.position, arch.activation, arch.num_kv_heads, arch.norm) == ("rope", "swiglu", 2, "layernorm")
    assert arch.ffn_hidden_size == 128
