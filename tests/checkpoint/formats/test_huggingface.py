"""Hugging Face folders: what transformers writes is read, what is written transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from megatron import checkpoint
from megatron.checkpoint import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model
from megatron.config.architecture import Architecture
from megatron.model.gpt import GPT, ModelInputs
from megatron.mpu.groups import single_process
from megatron.ops import reference_ops
from tests.checkpoint.formats.samples import FAMILIES, assert_equal, random_model
from tests.model.helpers import relative_error, tokens_of
from tests.model.test_hf import CASES, LOGITS_TOLERANCE, _random_model

READ = ReadOptions()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_written_and_read(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(FAMILIES[family], dtype)
    convert(model, "hf", tmp_path / "hf", WriteOptions(max_shard_bytes=20_000))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert_equal(open_model(tmp_path / "hf", None, READ), model)


@pytest.mark.parametrize("case", ["llama-gqa", "llama-tied-head-dim", "mistral", "bloom", "gpt2"])
def test_from_transformers_over_native_to_transformers(case: str, tmp_path: Path) -> None:
    theirs = _random_model(*CASES[case]).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()

    convert(open_model(tmp_path / "theirs", "hf", READ), "native", tmp_path / "native", WriteOptions())
    ours = _trained(tmp_path / "native")
    tokens, _ = tokens_of(ours[1])
    with torch.no_grad():
        logits = ours[0](tokens, ModelInputs())[..., : ours[1].vocab_size].transpose(0, 1)
        assert relative_error(logits, theirs(input_ids=tokens).logits) < LOGITS_TOLERANCE

    convert(open_model(tmp_path / "native", "native", READ), "hf", tmp_path / "back", WriteOptions())
    back = type(theirs).from_pretrained(tmp_path / "back")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back")]
    assert configs[0] == configs[1]
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def _trained(root: Path) -> tuple[GPT, Architecture]:
    """The model, loaded the way a run loads it."""
    model = open_model(root, "native", READ)
    ours = GPT(model.arch, ops=reference_ops(), groups=single_process())
    into = {f"model.{name}": parameter for name, parameter in ours.named_parameters()}
    loaded = checkpoint.load(root, into=into, sections={"model"}, vocab_size=model.arch.vocab_size, verify=True)
    assert loaded is not None and loaded.iteration == 0
    return ours, model.arch


def test_bin_files(tmp_path: Path) -> None:
    """As published before safetensors: shards of torch.save, some in the format of torch before 1.6."""
    model = random_model(FAMILIES["llama"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").state_dict()
    names = list(state)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    halves = {"a.bin": names[: len(names) // 2], "b.bin": names[len(names) // 2 :]}
    for file, part in halves.items():
        tensors = {name: state[name] for name in part}
        torch.save(tensors, folder / file, _use_new_zipfile_serialization=file == "a.bin")
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(open_model(folder, None, READ), model)


def test_missing_shard(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", WriteOptions(max_shard_bytes=20_000))
    second = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"1 of \d+ shards are missing: {second.name}"):
        open_model(tmp_path / "hf", "hf", READ)


def test_damaged_file(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", WriteOptions())
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors cannot be read"):
        open_model(tmp_path / "hf", "hf", READ)


def test_unknown_family(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", WriteOptions())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="model_type is 'mamba'; supported: llama"):
        open_model(tmp_path / "hf", "hf", READ)


def test_wrong_kind_of_folder(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", WriteOptions())
    with pytest.raises(CheckpointError, match="use --from hf instead of --from native"):
        open_model(tmp_path / "hf", "native", READ)
    with pytest.raises(CheckpointError, match="it does not exist"):
        open_model(tmp_path / "nowhere", None, READ)
    with pytest.raises(CheckpointError, match="no checkpoint that is known here"):
        open_model(tmp_path, None, READ)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", WriteOptions())
    with pytest.raises(CheckpointError, match="there already"):
        convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", WriteOptions())


def test_other_dtype_is_said_in_the_configuration(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"], torch.float32)
    convert(model, "hf", tmp_path / "hf", WriteOptions(dtype=torch.float16))
    found = open_model(tmp_path / "hf", "hf", READ)
    assert {record.dtype for record in found.weights.records.values()} == {"float16"}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float16"


def test_special_tokens_and_tokenizer_are_carried_along(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", WriteOptions())
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"bos_token_id": 5, "note": "kept"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert(open_model(tmp_path / "hf", None, READ), "native", tmp_path / "native", WriteOptions())
    settings = open_model(tmp_path / "native", None, READ).settings
    assert settings["tokenizer_type"] == "HuggingFaceTokenizer"
    assert Path(settings["tokenizer_model"], "tokenizer.json").is_file()
    convert(open_model(tmp_path / "native", None, READ), "hf", tmp_path / "back", WriteOptions())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
