from __future__ import annotations

import pytest

from megatron.config.legacy import LEGACY, Legacy
from megatron.config.parser import ConfigError
from tests.config.commands import config


def _other_value(row: Legacy) -> list[str]:
    """Words that give the option a value that is not its default."""
    option = row.option
    if option.kind == "switch":
        return [option.main]
    if option.kind == "word":
        return [option.main, "true"]
    other = [choice for choice in option.choices if choice != option.default]
    return [option.main, str(other[0]) if other else "7"]


def _rows(effect: str) -> list[Legacy]:
    return [row for row in LEGACY if row.effect == effect]


@pytest.mark.parametrize("row", _rows("refused"), ids=lambda row: row.option.dest)
def test_refused(row):
    with pytest.raises(ConfigError) as caught:
        config(*_other_value(row))
    (problem,) = caught.value.problems
    assert problem.startswith(row.option.main) and row.reason in problem


@pytest.mark.parametrize("row", _rows("renamed"), ids=lambda row: row.option.dest)
def test_renamed(row):
    with pytest.raises(ConfigError) as caught:
        config(*_other_value(row))
    (problem,) = caught.value.problems
    assert problem.startswith(row.option.main) and f"use {row.reason}" in problem


def _without_effect() -> list[Legacy]:
    needs_more = {"group_query_attention"}  # refused without the number of groups
    return [row for row in _rows("none") if row.option.dest not in needs_more]


@pytest.mark.parametrize("row", _without_effect(), ids=lambda row: row.option.dest)
def test_without_effect(row):
    run = config(*_other_value(row))
    assert run.notes == (f"{row.option.main} has no effect: {row.reason}",)
    assert run.values() == config().values()


def test_group_query_attention_is_said_by_the_number_of_groups():
    run = config("--group-query-attention", "--num-query-groups", "2")
    assert run.model.num_key_value_heads == 2
    assert run.as_namespace()["group_query_attention"] is True


def test_default_values_of_refused_options_pass():
    run = config("--retro-encoder-layers", "2", "--empty-unused-memory-level", "0", "--transformer-impl", "local")
    assert run.notes == ()


def test_settings_of_experts_say_that_there_are_none():
    run = config("--num-experts", "1", "--topk", "1", "--disable-moe-token-dropping")
    assert run.notes == ("--topk, --disable-moe-token-dropping: no effect, the model has no experts",)
