"""Presets have the published number of parameters, and the shapes of the models in transformers."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest

from megatron.config.architecture import Architecture
from megatron.config.model import ModelConfig
from megatron.config.parser import all_options, defaults
from megatron.config.presets import PRESETS, preset
from megatron.config.run import parse

PUBLISHED = {
    "gpt2": 124439808,
    "gpt2-medium": 354823168,
    "gpt2-large": 774030080,
    "gpt2-xl": 1557611200,
    "llama1-7b": 6738415616,
    "llama1-13b": 13015864320,
    "llama1-30b": 32528943616,
    "llama1-65b": 65285660672,
    "llama2-7b": 6738415616,
    "llama2-13b": 13015864320,
    "llama2-34b": 33743970304,
    "llama2-70b": 68976648192,
    "llama3-8b": 8030261248,
    "llama3-70b": 70553706496,
    "llama3.1-8b": 8030261248,
    "llama3.1-70b": 70553706496,
    "llama3.1-405b": 405853388800,
    "llama3.2-1b": 1235814400,
    "llama3.2-3b": 3212749824,
    "mistral-7b": 7241732096,
    "mixtral-8x7b": 46702792704,
    "bloom-560m": 559214592,
    "bloom-1b1": 1065314304,
    "bloom-1b7": 1722408960,
    "bloom-3b": 3002557440,
    "bloom-7b1": 7069016064,
    "bloom-176b": 176247271424,
}
RUN = "--mock-data --micro-batch-size 1 --seq-length 8 --lr 1 --train-iters 1"


def _architecture(name: str) -> Architecture:
    run = parse([*RUN.split(), "--preset", name, "--no-pad-vocab-size"], {})
    return run.architecture(PRESETS[name].vocab_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    assert PRESETS[name].num_parameters == PUBLISHED[name] == _architecture(name).num_parameters()


def test_presets_without_a_published_number_are_few():
    tiny = {"llama-tiny", "gpt-tiny", "bloom-tiny", "mixtral-tiny"}
    assert set(PRESETS) - set(PUBLISHED) == {"bloom-13b", "llama-mini", "mixtral-small"} | tiny
    assert 10e6 < _architecture("llama-mini").num_parameters() < 20e6


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_architecture_alone(name):
    fields = ModelConfig.__dataclass_fields__.keys() - {"preset", "init_method_std", "make_vocab_size_divisible_by"}
    fields |= {"num_experts", "topk", "expert_interval", "moe_token_dropping", "moe_top2_2nd_expert_sampling"}
    settings = PRESETS[name].settings
    assert settings.keys() <= fields
    assert PRESETS[name].source
    for setting, value in settings.items():
        option = all_options()[setting]
        assert option.outside_limits(value) is None
        assert not option.choices or value in option.choices
        assert setting in defaults()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_equals_its_flags(name):
    flags = [word for key, value in PRESETS[name].settings.items() for word in all_options()[key].words(value)]
    spelled = parse([*RUN.split(), "--vocab-size", "9", *flags], {}).architecture(10)
    assert spelled == parse([*RUN.split(), "--vocab-size", "9", "--preset", name], {}).architecture(10)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"--preset bloom-7b: no such preset; the nearest is bloom-7b1"):
        preset("bloom-7b")
    with pytest.raises(ValueError, match=r"--preset xyz: no such preset; known: gpt2, "):
        preset("xyz")


def _llama(arch: Architecture) -> dict[str, Any]:
    scaling = arch.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "intermediate_size": arch.ffn_hidden_size,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_epsilon,
        "tie_word_embeddings": arch.tied_embeddings,
        "rope_parameters": rope,
    }


def _model_of_transformers(name: str, arch: Architecture) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        if arch.position == "alibi":
            sizes = {"n_layer": arch.num_layers, "hidden_size": arch.hidden_size, "n_head": arch.num_heads}
            return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=arch.vocab_size, **sizes))
        if arch.position == "learned":
            sizes = {"n_layer": arch.num_layers, "n_embd": arch.hidden_size, "n_head": arch.num_heads}
            positions = {"vocab_size": arch.vocab_size, "n_positions": arch.max_positions}
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **positions))
        if arch.sliding_window is not None:
            config = transformers.MistralConfig(sliding_window=arch.sliding_window, **_llama(arch))
            return transformers.MistralForCausalLM(config)
        if arch.experts is not None:
            experts = {"num_local_experts": arch.experts.count, "num_experts_per_tok": arch.experts.topk}
            return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_llama(arch), **experts))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_llama(arch)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters_in_transformers(name):
    arch = _architecture(name)
    model = _model_of_transformers(name, arch)
    assert sum(math.prod(parameter.shape) for parameter in model.parameters()) == arch.num_parameters()
