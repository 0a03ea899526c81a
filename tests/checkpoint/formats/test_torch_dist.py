"""Megatron-Core's torch_dist checkpoints, against one that Megatron-Core wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron.checkpoint import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model
from megatron.checkpoint.formats.dcp import write_container
from megatron.checkpoint.formats.lazy import LazyTensors
from megatron.checkpoint.formats.merge import to_dialect
from megatron.checkpoint.formats.torch_dist import _stacks
from megatron.model.gpt import GPT, ModelInputs
from megatron.mpu.groups import single_process
from megatron.ops import reference_ops
from tests.checkpoint.formats.samples import FAMILIES, assert_equal, random_model
from tests.model.helpers import relative_error
from tests.model.test_hf import LOGITS_TOLERANCE

READ = ReadOptions()
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "torch_dist"


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"bloom"}))
def test_every_family(family: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES[family])
    convert(model, "torch_dist", tmp_path / "out", WriteOptions())
    assert_equal(open_model(tmp_path / "out", None, READ), model)


def test_experts_of_all_layers_are_one_tensor_and_of_some_layers_are_not(tmp_path: Path) -> None:
    arch = FAMILIES["mixtral"]
    some = replace(arch, experts=replace(arch.experts, layers=(1, 3)))
    for name, one in (("all", arch), ("some", some)):
        model = random_model(one)
        convert(model, "torch_dist", tmp_path / name, WriteOptions())
        assert_equal(open_model(tmp_path / name, None, READ), model)
    found = [FileSystemReader(tmp_path / name / "release").read_metadata() for name in ("all", "some")]
    whole, single = (index.state_dict_metadata for index in found)
    assert whole["decoder.layers.mlp.experts.experts.linear_fc1.weight"].size == torch.Size((4, 4, 96, 32))
    assert single["decoder.layers.3.mlp.experts.experts.linear_fc2.weight"].size == torch.Size((4, 32, 48))


def test_a_checkpoint_of_megatron_core() -> None:
    """Its tensors, in this project's model, give Megatron-Core's logits."""
    truth = json.loads((GOLDEN / "logits.json").read_text())
    found = open_model(GOLDEN, None, ReadOptions(config=GOLDEN))
    assert found.iteration == 5
    model = GPT(found.arch, ops=reference_ops(), groups=single_process())
    model.load_state_dict({name: found.weights.read(name) for name in found.weights.records})
    with torch.no_grad():
        logits = model(torch.tensor([truth["tokens"]]), ModelInputs())[:, 0]
    assert relative_error(logits, torch.tensor(truth["logits"])) < LOGITS_TOLERANCE


def test_names_and_shapes_are_those_of_megatron_core(tmp_path: Path) -> None:
    found = open_model(GOLDEN, None, ReadOptions(config=GOLDEN))
    convert(found, "torch_dist", tmp_path / "out", WriteOptions(divisible_by=32))
    indices = [FileSystemReader(root / "iter_0000005").read_metadata() for root in (GOLDEN, tmp_path / "out")]
    theirs, ours = ({n: getattr(e, "size", None) for n, e in i.state_dict_metadata.items()} for i in indices)
    assert ours == theirs
    for root in (GOLDEN, tmp_path / "out"):
        assert json.loads((root / "iter_0000005" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert torch.load(tmp_path / "out" / "iter_0000005" / "common.pt", weights_only=False)["iteration"] == 5


@pytest.mark.parametrize("weights", ["optimizer.state.param.", "optimizer.fp32_param."])
def test_optimizer_state_is_read(weights: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"], torch.float32, moments=True)
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    sources = {weights: model.weights}
    sources |= {f"optimizer.state.{entry}.": tensors for entry, tensors in model.moments.items()}
    sources[""] = random_model(FAMILIES["llama"]).weights
    records, places, stacks = {}, {}, {}
    for prefix, tensors in sources.items():
        whole = to_dialect(model, "core-te", WriteOptions(), tensors)
        records |= {prefix + name: record for name, record in whole.tensors.records.items()}
        places |= {prefix + name: (whole.tensors, name) for name in whole.tensors.records}
        stacks |= {prefix + name: [prefix + part for part in parts] for name, parts in _stacks(whole).items()}
    everything = LazyTensors(records, lambda name: places[name][0].read(places[name][1]))
    (tmp_path / "out").mkdir()
    write_container(tmp_path / "out", everything, stacks=stacks)
    found = open_model(tmp_path / "out", "torch_dist", ReadOptions(config=tmp_path / "hf"))
    assert_equal(found, model)
    alone = open_model(tmp_path / "out", "torch_dist", ReadOptions(config=tmp_path / "hf", optimizer=False))
    assert_equal(alone, replace(random_model(FAMILIES["llama"])))


def test_common_data_in_the_container(tmp_path: Path) -> None:
    """As Megatron-LM writes it since July 2026, without common.pt."""
    model = random_model(FAMILIES["llama"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    whole = to_dialect(model, "core", WriteOptions())
    (tmp_path / "out").mkdir()
    common = {"common_state/shard_0_1": {"iteration": 9, "checkpoint_version": 3.0}}
    write_container(tmp_path / "out", whole.tensors, stacks=_stacks(whole), objects=common)
    found = open_model(tmp_path / "out", "torch_dist", ReadOptions(config=tmp_path / "hf"))
    assert found.iteration == 9
    assert_equal(found, model)


def test_layers_that_are_not_stacked(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    (tmp_path / "out").mkdir()
    write_container(tmp_path / "out", to_dialect(model, "core", WriteOptions()).tensors)
    assert_equal(open_model(tmp_path / "out", "torch_dist", ReadOptions(config=tmp_path / "hf")), model)


def test_a_missing_file(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "torch_dist", tmp_path / "out", WriteOptions())
    next((tmp_path / "out").glob("*/__0_0.distcp")).unlink()
    found = open_model(tmp_path / "out", None, READ)
    with pytest.raises(CorruptCheckpoint, match=r"head\.weight|output_layer\.weight"):
        found.weights.read("head.weight")
    next((tmp_path / "out").glob("*/.metadata")).unlink()
    with pytest.raises(CorruptCheckpoint, match=r"has no \.metadata"):
        open_model(tmp_path / "out", "torch_dist", READ)


def test_what_megatron_core_does_not_compute(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"embedding\.norm\.weight has no place"):
        convert(random_model(FAMILIES["bloom"]), "torch_dist", tmp_path / "out", WriteOptions())
    with pytest.raises(CheckpointError, match="is not split for a layout"):
        convert(random_model(FAMILIES["llama"]), "torch_dist", tmp_path / "out", WriteOptions(tp=2))
