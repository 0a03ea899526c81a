"""The command line of the converter, and the thin commands with the spellings of other projects."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats import FORMATS, ReadOptions, WriteOptions, convert, open_model
from megatron.checkpoint.formats.model import with_vocabulary
from megatron.config.presets import preset
from tests.checkpoint.formats.samples import FAMILIES, MAIN_FAMILIES, assert_equal, random_model
from tests.support import load_tool, run_script

TOOLS = Path(__file__).resolve().parents[2] / "tools"
QUIET = WriteOptions(log=lambda _: None)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a tool in this process."""

    def run(name: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        load_tool(name).main()

    return run


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_hugging_face_through_every_format(family: str, tool: Any, tmp_path: Path, capsys: Any) -> None:
    """hf -> X -> hf for every X that can hold the family: the tensors and the configuration come back."""
    model = random_model(FAMILIES[family])
    convert(model, "hf", tmp_path / "hf", QUIET)
    without = {"torch_dist", "nxd"} if family == "bloom" else {"nxd"} if family == "gpt2" else set()
    for kind in FORMATS.keys() - without - {"hf"}:
        layout = ["--target-tensor-parallel-size", 2] if FORMATS[kind].sharded else []
        tool("convert_checkpoint.py", "--to", kind, "--load", tmp_path / "hf", "--save", tmp_path / kind, *layout)
        dtype = ["--dtype", "bf16"] if kind == "universal" else []
        back = tmp_path / f"{kind}-back"
        tool("convert_checkpoint.py", "--from", kind, "--to", "hf", "--load", tmp_path / kind, "--save", back, *dtype)
        assert_equal(open_model(back, "hf", ReadOptions()), model)
        assert (back / "config.json").read_text() == (tmp_path / "hf" / "config.json").read_text(), kind
    assert "parameters" in capsys.readouterr().out


def test_mistakes_end_with_one_line(tmp_path: Path) -> None:
    done = run_script("tools/convert_checkpoint.py", "--to", "hf", "--load", tmp_path, "--save", tmp_path / "x")
    assert done.returncode != 0
    assert "no checkpoint that is known here" in done.stderr and "Traceback" not in done.stderr


ASCEND = "ckpt_convert/llama/convert_weights_from_huggingface.py"
CHANGE = "ckpt_convert/llama/convert_weights_when_tp_pp_change.py"
SIZE = ["--type", "tiny", "--num_layers", 4, "--hidden_size", 32, "--num_heads", 8]


@pytest.mark.parametrize(
    ("flags", "kind", "name"),
    [
        ([], "megatron", "mp_rank_01_001/model_optim_rng.pt"),
        (["--merge-mlp", "--dialect", "modellink"], "megatron", "mp_rank_01_001/model_optim_rng.pt"),
        (["--pipeline-model-parallel-size", 1, "--deepspeed"], "deepspeed", "mp_rank_01_model_states.pt"),
    ],
)
def test_ascendspeed(flags: list[object], kind: str, name: str, tool: Any, tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "hf", tmp_path / "hf", QUIET)
    layout = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    folders = ["--input-model-dir", tmp_path / "hf", "--output-model-dir", tmp_path / "out"]
    tool(ASCEND, *folders, *SIZE, *layout, *flags)
    assert (tmp_path / "out" / "release" / name).is_file()
    tracker = "latest" if kind == "deepspeed" else "latest_checkpointed_iteration.txt"
    assert (tmp_path / "out" / tracker).read_text() == "release"
    assert_equal(open_model(tmp_path / "out", kind, ReadOptions()), model)


def test_ascendspeed_adds_tokens(tool: Any, tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "hf", tmp_path / "hf", QUIET)
    folders = ["--input-model-dir", tmp_path / "hf", "--output-model-dir", tmp_path / "out"]
    tool(ASCEND, *folders, *SIZE, "--added-token-num", 3, "--make-vocab-size-divisible-by", 2)
    state = torch.load(tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    assert state["model"]["embedding.word_embeddings.weight"].shape == (86, 32)
    assert_equal(open_model(tmp_path / "out", None, ReadOptions()), with_vocabulary(model, 86))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--type", "33B"], r"--type 33B layers: 60, but 4; --type 33B hidden size: 6656, but 32"),
        ([*SIZE, "--num_kv_heads", 8], "--num_kv_heads: 8, but 4"),
        ([*SIZE, "--bias"], "--bias: the model has no biases"),
        ([*SIZE, "--pse"], "models of Baichuan are not supported"),
        ([*SIZE, "--deepspeed", "--pipeline-model-parallel-size", 2], "DeepSpeed has stages in pipeline modules only"),
    ],
)
def test_ascendspeed_refuses(flags: list[object], message: str, tool: Any, tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", QUIET)
    with pytest.raises(CheckpointError, match=message):
        tool(ASCEND, "--input-model-dir", tmp_path / "hf", "--output-model-dir", tmp_path / "out", *flags)


def test_ascendspeed_changes_the_layout(tool: Any, tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "hf", tmp_path / "hf", QUIET)
    convert(model, "megatron", tmp_path / "in", replace(QUIET, tp=4, dialect="ascendspeed"))
    folders = ["--input-model-dir", tmp_path / "in" / "release", "--output-model-dir", tmp_path / "out"]
    layout = ["--tgt-tensor-model-parallel-size", 2, "--tgt-pipeline-model-parallel-size", 2]
    model_flags = ["--hf-config", tmp_path / "hf", "--orig-vocab-size", 83]
    with pytest.raises(CheckpointError, match=r"--src-tensor-model-parallel-size 8: .* was written for 4"):
        tool(CHANGE, *folders, *layout, *model_flags, "--src-tensor-model-parallel-size", 8)
    tool(CHANGE, *folders, *layout, *model_flags, "--src-tensor-model-parallel-size", 4)
    assert len(list((tmp_path / "out" / "release").glob("mp_rank_*_*"))) == 4
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf")), model)


def test_ascendspeed_as_its_readme_writes_it(tool: Any, tmp_path: Path) -> None:
    """mkdir model_weights; the model was cloned into ./tokenizer; of 33B the real sizes, but for the widths."""
    arch = replace(
        FAMILIES["llama"], num_layers=60, num_heads=52, num_kv_heads=52, head_dim=2, hidden_size=104, ffn_hidden_size=16
    )
    model = random_model(arch)
    convert(model, "hf", tmp_path / "tokenizer" / "llama-33b-hf", QUIET)
    (tmp_path / "model_weights").mkdir()
    folders = ["--input-model-dir", f"{tmp_path}/tokenizer", "--output-model-dir", f"{tmp_path}/model_weights"]
    layout = ["--tensor-model-parallel-size", 8, "--pipeline-model-parallel-size", 4]
    with pytest.raises(CheckpointError, match="--type 33B hidden size: 6656, but 104"):
        tool(ASCEND, *folders, *layout, "--type", "33B")
    sizes = ["--type", "narrow", "--num_layers", 60, "--hidden_size", 104, "--num_heads", 52]
    with pytest.raises(CheckpointError, match="52 query heads cannot be divided over 8 ranks"):
        tool(ASCEND, *folders, *layout, *sizes)
    tool(ASCEND, *folders, *layout, *sizes, "--tensor-model-parallel-size", 4)
    assert len(list((tmp_path / "model_weights" / "release").iterdir())) == 16
    assert_equal(open_model(tmp_path / "model_weights", None, ReadOptions()), model)


NEURON = "ckpt_convert/convert_checkpoints.py"


def test_neuron_as_its_tutorial_writes_it(tool: Any, tmp_path: Path) -> None:
    """Without --hw_backend; the configuration is in the full model's folder, or given as config.json."""
    model = random_model(FAMILIES["mistral"])
    convert(model, "hf", tmp_path / "full_model", QUIET)
    layout = ["--tp_size", 4, "--pp_size", 2, "--n_layers", 4]
    there = ["--input_dir", tmp_path / "full_model", "--output_dir", tmp_path / "sharded", "--convert_from_full_model"]
    more = ["--kv_size_multiplier", 2, "--qkv_linear", "True"]
    tool(NEURON, *layout, *there, *more)
    back = ["--input_dir", tmp_path / "sharded", "--output_dir", tmp_path / "full", "--convert_to_full_model"]
    config = ["--config", tmp_path / "full_model" / "config.json", "--load_xser", "True"]
    tool(NEURON, *layout, *back, *more, *config)
    assert_equal(open_model(tmp_path / "full", "nxd", ReadOptions(config=tmp_path / "full_model")), model)


@pytest.mark.parametrize("backend", ["trn1", "trn2"])
@pytest.mark.parametrize("fuse", [[], ["--fuse_qkv", "True"]], ids=["unfused", "fused"])
def test_neuron_there_and_back(backend: str, fuse: list[str], tool: Any, tmp_path: Path) -> None:
    model = random_model(FAMILIES["mistral"])
    convert(model, "hf", tmp_path / "hf", QUIET)
    always = ["--hw_backend", backend, "--config", tmp_path / "hf" / "config.json", "--qkv_linear", 1, *fuse]
    layout = ["--tp_size", 4, "--pp_size", 2, "--kv_size_multiplier", 2]
    sharded, full = tmp_path / "sharded", tmp_path / "full"
    there = ["--convert_from_full_state", "--input_dir", tmp_path / "hf", "--output_dir", sharded]
    tool(NEURON, *there, *always, *layout)
    assert len(list((sharded / "model").iterdir())) == 8
    back = ["--convert_to_full_model", "--input_dir", sharded / "model", "--output_dir", full]
    tool(NEURON, *back, *always, *layout, "--load_xser", "False")
    assert_equal(open_model(full, "nxd", ReadOptions(config=tmp_path / "hf")), model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--convert_to_xser"], "--convert_to_xser: one file per tensor is read, but not written"),
        (["--convert_to_full_state", "--ep_size", 2], "--ep_size 2: only 1 is supported"),
        (["--convert_to_full_state", "--model_style", "megatron"], "--model_style megatron"),
        (["--convert_to_full_state", "--hf_model_name", "x"], "nothing is downloaded here"),
    ],
)
def test_neuron_refuses(flags: list[object], message: str, tool: Any, tmp_path: Path) -> None:
    always = ["--hw_backend", "trn1", "--input_dir", tmp_path, "--output_dir", tmp_path / "out"]
    with pytest.raises(CheckpointError, match=message):
        tool(NEURON, *always, *flags)


def test_deepspeed_to_universal(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(FAMILIES["llama"], torch.float32)
    convert(model, "deepspeed", tmp_path / "run", replace(QUIET, tp=2))
    monkeypatch.setenv("HL_LATEST_CHECKPOINT", str(tmp_path / "run" / "global_step0"))
    tool("ckpt_convert/convert_ds_to_universal.py", "--num_merge_workers", 2)
    assert (tmp_path / "run" / "latest_universal").read_text() == "global_step0_universal"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not any(name.startswith(".") for name in names), "nothing is left behind"
    assert_equal(open_model(tmp_path / "run", "universal", ReadOptions()), model)
    with pytest.raises(CheckpointError, match="is there already"):
        tool("ckpt_convert/convert_ds_to_universal.py")


def test_the_sizes_of_ascendspeed_are_those_of_the_presets() -> None:
    sizes, presets = load_tool(ASCEND).SIZES, load_tool(CHANGE).PRESETS
    assert sizes.keys() == presets.keys()
    for size, name in presets.items():
        settings = preset(name).settings
        assert sizes[size] == tuple(settings[key] for key in ("num_layers", "hidden_size", "num_attention_heads"))
