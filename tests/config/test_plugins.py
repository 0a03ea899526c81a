"""Plugins of Colossal-AI: each parses, obeys the rules, says what it sets, and gives way to flags."""

from __future__ import annotations

import pytest

from megatron.config.parser import ConfigError, shown
from megatron.config.plugins import PLUGINS
from megatron.config.run import RunConfig, parse
from tests.config.commands import config

RANKS = 8


def _with(name: str, *words: str) -> RunConfig:
    without = ("--micro-batch-size",) if "micro_batch_size" in PLUGINS[name].settings else ()
    return config("--plugin", name, *words, without=without, world_size=RANKS)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_sets_what_it_says(name):
    run = _with(name)
    settings = PLUGINS[name].settings
    assert {setting: run.values()[setting] for setting in settings} == settings
    assert run.parallel.zero_stage_native == settings["zero_stage"]
    assert run.notes[0] == f"--plugin {name} sets " + " ".join(shown(*item) for item in settings.items())
    again = parse(run.to_flags(), {"WORLD_SIZE": str(RANKS)})
    assert again.values() == run.values()


@pytest.mark.parametrize("name", PLUGINS)
def test_flags_win(name):
    run = _with(name, "--zero-stage", "1")
    assert run.parallel.zero_stage == run.parallel.zero_stage_native == 1
    assert run.notes[0].endswith("; other flags win: --zero-stage 1")


def test_sizes_of_a_plugin_can_be_changed():
    run = _with("hybrid_parallel", "--tensor-model-parallel-size", "2", "--micro-batch-size", "4")
    assert (run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size) == (2, 2)
    assert run.training.micro_batch_size == 4


def test_rules_hold_for_what_a_plugin_sets():
    with pytest.raises(ConfigError, match="world size 4: must be a multiple of 8"):
        config("--plugin", "hybrid_parallel", without=("--micro-batch-size",), world_size=4)


def test_other_names_are_refused():
    with pytest.raises(ConfigError, match="--plugin ddp: must be one of gemini, gemini_auto, zero2"):
        config("--plugin", "ddp")
