"""Spellings of the settings of 8-bit numbers."""

from __future__ import annotations

import pytest

from megatron.config.parser import ConfigError
from tests.config.commands import config

FORMAT = ("--fp8-format", "hybrid", "--seq-length", "64", "--max-position-embeddings", "64", "--hidden-size", "64")


def _problems(*flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config(*flags)
    return caught.value.problems


def test_defaults():
    precision = config().precision
    assert precision.fp8_format is None and precision.fp8_recipe == "delayed" and precision.fp8_amax_reduce


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "hybrid"])
def test_megatrons_spelling(name):
    assert config(*FORMAT[2:], f"--fp8-{name}").precision.fp8_format == name


def test_two_formats_contradict_each_other():
    assert any("fp8" in problem for problem in _problems(*FORMAT[2:], "--fp8-e4m3", "--fp8-hybrid"))


def test_current_scaling_has_two_names():
    assert config(*FORMAT, "--fp8-recipe", "current").precision.fp8_recipe == "tensorwise"


def test_switches():
    precision = config(*FORMAT, "--no-fp8-amax-reduce", "--no-fp8-wgrad").precision
    assert not precision.fp8_amax_reduce and not precision.fp8_wgrad
    assert config(*FORMAT, "--fp8-amax-reduce").precision.fp8_amax_reduce


def test_weights_are_kept_by_either_name():
    for flags in (("--cache-fp8-weight",), ("--cache-fp8-weight-fwd",), ("--cache-fp8-weight-fwd", "true")):
        assert config(*FORMAT, *flags).precision.cache_fp8_weight
    assert not config(*FORMAT, "--cache-fp8-weight-fwd", "false").precision.cache_fp8_weight
    assert _problems("--cache-fp8-weight") == ("--cache-fp8-weight: only with --fp8-format",)
    assert "cache_fp8_weight" in _problems(*FORMAT, "--cache-fp8-weight", "--cache-fp8-weight-fwd", "false")[0]


def test_an_interval_is_at_least_a_step():
    assert "--fp8-interval 0: must be at least 1" in _problems(*FORMAT, "--fp8-interval", "0")
