"""Every option of Megatron-DeepSpeed (commit 4efb479d) is there, with its spelling, name, type, choices and default."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron.config.parser import all_options, build_parser

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "megatron_deepspeed_flags.json").read_text())
KINDS = {"int": "int", "float": "float", "str": "str", "bool": "word", "store_true": "switch", "store_false": "switch"}

# Values that are accepted beyond Megatron-DeepSpeed's, and why.
MORE_CHOICES = {
    "distributed_backend": "collective libraries of the devices that Megatron-DeepSpeed does not know",
    "recompute_granularity": "the feed-forward block, which NeuronX Distributed recomputes with long sequences",
    "lr_decay_style": "Megatron-LM's warm-up, stable, decay",
    "tokenizer_type": "names of Megatron-LM and of the Gaudi and BigScience forks for the same files",
    "optimizer": "names of the Gaudi fork",
    "profile": "the profiler of the Gaudi fork",
}
# Options that Megatron-DeepSpeed checks later than its parser does, or not at all.
FEWER_VALUES = {
    "mlp_type": "its help names these two",
    "zero_stage": "DeepSpeed knows these four",
}


@pytest.fixture(scope="module")
def actions() -> dict[str, argparse.Action]:
    return {name: action for action in build_parser()._actions for name in action.option_strings}


def test_the_golden_file_is_complete():
    assert len(GOLDEN) == 314
    assert len({flag for row in GOLDEN for flag in row["flags"]}) == 316


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["flags"][0])
def test_option(row, actions):
    option = all_options()[row["dest"]]
    assert set(row["flags"]) <= set(option.names)
    assert option.kind == KINDS[row["type"]]
    for flag in row["flags"]:
        action = actions[flag]
        assert action.dest == row["dest"]
        assert action.default == row["default"]
        assert action.nargs == (0 if option.kind == "switch" else "?" if option.kind == "word" else row.get("nargs"))
        if option.kind == "switch":
            assert action.const is (row["type"] == "store_true")
        for choice in row.get("choices", ()):
            assert option.read(str(choice)) == choice
    published = tuple(row.get("choices", ()))
    if set(option.choices) != set(published):
        assert row["dest"] in (MORE_CHOICES if published else FEWER_VALUES)
        assert set(published) <= set(option.choices)


def test_exceptions_are_needed():
    """A reason that is no longer needed is removed."""
    published = {row["dest"]: set(row.get("choices", ())) for row in GOLDEN}
    for dest in MORE_CHOICES:
        assert set(all_options()[dest].choices) > published[dest] != set()
    for dest in FEWER_VALUES:
        assert all_options()[dest].choices and not published[dest]
