"""DeepSpeed's universal form, which carries the optimizer along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import CorruptCheckpoint
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model
from megatron.checkpoint.formats.lazy import cast_view
from tests.checkpoint.formats.samples import FAMILIES, MAIN_FAMILIES, assert_equal, random_model

READ = ReadOptions()


@pytest.mark.parametrize("dialect", ["pipeline", "pipeline-lambdas", "megatron"])
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_family_with_its_optimizer(family: str, dialect: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES[family], torch.float32, moments=True)
    convert(model, "universal", tmp_path / "out", WriteOptions(tp=2, pp=2, dialect=dialect))
    found = open_model(tmp_path / "out", None, READ)
    assert_equal(found, model)
    assert (found.steps, found.iteration) == (7, 7)


def test_over_universal_to_native_and_back(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"], torch.float32, moments=True)
    convert(model, "native", tmp_path / "native", WriteOptions())
    convert(open_model(tmp_path / "native", None, READ), "universal", tmp_path / "universal", WriteOptions())
    convert(open_model(tmp_path / "universal", None, READ), "native", tmp_path / "back", WriteOptions())
    found = open_model(tmp_path / "back", None, READ)
    assert_equal(found, model)
    assert (found.steps, found.progress["consumed_train_samples"]) == (7, 56)


def test_weights_alone(tmp_path: Path) -> None:
    model = random_model(FAMILIES["mistral"])
    convert(model, "universal", tmp_path / "out", WriteOptions())
    found = open_model(tmp_path / "out", None, READ)
    assert_equal(found, replace(model, weights=cast_view(model.weights, torch.float32)))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "universal", tmp_path / "out", WriteOptions(dialect="megatron"))
    (next((tmp_path / "out").glob("*/zero/*layers.2.mlp.dense_4h_to_h.weight")) / "fp32.pt").unlink()
    with pytest.raises(ValueError, match=r"missing .*layers\.2\.mlp\.dense_4h_to_h\.weight"):
        open_model(tmp_path / "out", None, READ)


def test_missing_arguments(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "universal", tmp_path / "out", WriteOptions())
    next((tmp_path / "out").glob("*/mp_rank_00_model_states.pt")).unlink()
    with pytest.raises(CorruptCheckpoint, match=r"has no mp_rank_00_model_states\.pt"):
        open_model(tmp_path / "out", None, READ)
