"""Megatron's files: every layout and family comes back bit by bit, and the layout is the one that Megatron reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model
from megatron.checkpoint.formats.names import DIALECTS
from tests.checkpoint.formats.samples import FAMILIES, MAIN_FAMILIES, assert_equal, random_model

READ = ReadOptions()
LAYOUTS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (2, 4)]


def _through(family: str, tp: int, pp: int, folder: Path, dialect: str | None = None) -> None:
    model = random_model(FAMILIES[family])
    options = WriteOptions(tp=tp, pp=pp, divisible_by=8, dialect=dialect)
    convert(model, "megatron", folder, options)
    assert_equal(open_model(folder, None, READ), model)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_layout_and_family(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    _through(family, tp, pp, tmp_path / "megatron")


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(MAIN_FAMILIES)))
def test_further_families(family: str, tmp_path: Path) -> None:
    _through(family, 2, 2, tmp_path / "megatron")


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("dialect", ["core", "core-te", "core-te-grouped", "megatron", "legacy", "modellink"])
def test_experts(dialect: str, tp: int, pp: int, tmp_path: Path) -> None:
    _through("mixtral", tp, pp, tmp_path / "megatron", dialect)


def test_names_of_experts_in_megatron_core(tmp_path: Path) -> None:
    model = random_model(FAMILIES["mixtral"])
    convert(model, "megatron", tmp_path / "out", WriteOptions(tp=2, pp=2, divisible_by=8))
    tensors = _file(tmp_path / "out" / "release", "mp_rank_01_001")["model"]
    gate, up, down = (model.weights.read(f"layers.3.mlp.experts.{part}.weight")[2] for part in ("gate", "up", "down"))
    expert = "decoder.layers.1.mlp.experts.local_experts.2."
    assert torch.equal(tensors[f"{expert}linear_fc1.weight"], torch.cat((gate[24:], up[24:])))
    assert torch.equal(tensors[f"{expert}linear_fc2.weight"], down[:, 24:])
    router = model.weights.read("layers.3.mlp.router.weight")
    assert torch.equal(tensors["decoder.layers.1.mlp.router.weight"], router)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect(dialect: str, tmp_path: Path) -> None:
    _through("llama", 2, 2, tmp_path / "megatron", dialect)


@pytest.mark.parametrize("dialect", ["ascendspeed", "ascendspeed-merged", "modellink", "legacy"])
@pytest.mark.parametrize("family", ["mixtral", "bloom", "gpt2"])
def test_other_models_of_ascendspeed_and_modellink(family: str, dialect: str, tmp_path: Path) -> None:
    _through(family, 2, 2, tmp_path / "megatron", dialect)


def test_names_of_experts_in_ascendspeed_and_modellink(tmp_path: Path) -> None:
    """AscendSpeed: DeepSpeed's experts, with a gate of their own. ModelLink: Mixtral's own names in legacy layers."""
    model = random_model(FAMILIES["mixtral"])
    gate, up, down = (model.weights.read(f"layers.3.mlp.experts.{part}.weight")[2] for part in ("gate", "up", "down"))
    for dialect, layer, names in (
        (
            "ascendspeed",
            "mlp.deepspeed_moe.experts.deepspeed_experts.2.",
            ("gate_proj", "dense_h_to_4h", "dense_4h_to_h"),
        ),
        ("legacy", "mlp.block.moe_layer.experts.experts.2.", ("w1", "w3", "w2")),
    ):
        convert(model, "megatron", tmp_path / dialect, WriteOptions(tp=2, divisible_by=8, dialect=dialect))
        encoder = _file(tmp_path / dialect / "release", "mp_rank_01")["model"]["language_model"]["encoder"]
        found = [encoder[f"layers.3.{layer}{name}.weight"] for name in names]
        for tensor, expected in zip(found, (gate[24:], up[24:], down[:, 24:]), strict=True):
            assert torch.equal(tensor, expected)
    assert "layers.3.mlp.block.moe_layer.gate.weight.weight" in encoder and "final_norm.weight" in encoder


def _file(folder: Path, rank: str) -> dict[str, Any]:
    return torch.load(folder / rank / "model_optim_rng.pt", weights_only=False)


def test_rows_are_per_group_and_gate_and_up_per_rank(tmp_path: Path) -> None:
    """Against the format written down by hand: 8 query heads and 4 key-value heads of 4 rows, 48 rows of gate."""
    model = random_model(FAMILIES["llama"])
    convert(model, "megatron", tmp_path / "out", WriteOptions(tp=2, pp=2, divisible_by=8))
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    state = _file(tmp_path / "out" / "release", "mp_rank_01_001")
    assert state["checkpoint_version"] == 3.0
    layer = model.weights.read, "layers.3."  # the second of the two layers of the second stage
    q, k, v = (layer[0](f"{layer[1]}attention.{part}.weight") for part in ("query", "key", "value"))
    encoder = state["model"]["language_model"]["encoder"]
    qkv = [q[16:24], k[8:12], v[8:12], q[24:32], k[12:16], v[12:16]]  # the third and the fourth group
    assert torch.equal(encoder["layers.1.self_attention.query_key_value.weight"], torch.cat(qkv))
    gate, up = (layer[0](f"{layer[1]}mlp.{part}.weight") for part in ("gate", "up"))
    assert torch.equal(encoder["layers.1.mlp.dense_h_to_4h.weight"], torch.cat((gate[24:], up[24:])))
    down = layer[0](f"{layer[1]}mlp.down.weight")
    assert torch.equal(encoder["layers.1.mlp.dense_4h_to_h.weight"], down[:, 24:])
    head = state["model"]["language_model"]["output_layer"]["weight"]
    assert torch.equal(head[:35], model.weights.read("head.weight")[48:]) and not head[35:].any()
    assert head.shape == (48, 32)
    first = _file(tmp_path / "out" / "release", "mp_rank_00_000")["model"]["language_model"]
    assert first["embedding"]["word_embeddings"]["weight"].shape == (48, 32)
    assert "final_layernorm.weight" not in first["encoder"]


def test_arguments_describe_the_model(tmp_path: Path) -> None:
    model = random_model(FAMILIES["gpt2"], moments=True)
    convert(model, "megatron", tmp_path / "out", WriteOptions(tp=2, pp=2))
    state = _file(tmp_path / "out" / "iter_0000007", "mp_rank_01_001")
    args = state["args"]
    assert (args.num_layers, args.num_attention_heads, args.tensor_model_parallel_size) == (4, 8, 2)
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by) == (256, 128)
    assert (args.params_dtype, args.consumed_train_samples, state["iteration"]) == (torch.bfloat16, 56, 7)
    tied = state["model"]["word_embeddings_for_head"]["weight"]
    assert torch.equal(tied[:0], model.weights.read("embedding.word.weight")[:0]) and tied.shape == (128, 32)
    found = open_model(tmp_path / "out", "megatron", READ)
    assert found.progress["consumed_train_samples"] == 56 and found.iteration == 7


@pytest.mark.parametrize("version", [0, 1.0])
def test_first_versions_of_the_format(version: float, tmp_path: Path) -> None:
    """Megatron-LM of 2020: other names, and queries, keys and values outermost (0) or innermost (1.0)."""
    arch = FAMILIES["gpt2"]
    model = random_model(arch)
    convert(model, "megatron", tmp_path / "new", WriteOptions(tp=2))
    for rank in ("mp_rank_00", "mp_rank_01"):
        path = tmp_path / "new" / "release" / rank / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)
        language_model = state["model"]["language_model"]
        encoder = language_model.pop("encoder")
        for name, tensor in encoder.items():
            if "query_key_value" in name:
                blocks = tensor.unflatten(0, (4, 3, 4))  # heads of this rank, 3, rows of a head
                order = (1, 0, 2) if version == 0 else (0, 2, 1)
                encoder[name] = blocks.permute(*order, *range(3, blocks.dim())).flatten(0, 2).clone()
        language_model["transformer"] = {n.replace("self_attention", "attention"): t for n, t in encoder.items()}
        torch.save({**state, "checkpoint_version": version}, path)
    assert_equal(open_model(tmp_path / "new", None, READ), model)


def test_the_layout_of_megatron_deepspeed_since_2024(tmp_path: Path) -> None:
    """Thirds, as in version 0, in a file that says 3.0."""
    model = random_model(FAMILIES["gpt2"])
    convert(model, "megatron", tmp_path / "out", WriteOptions(dialect="core"))
    path = tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    for name, tensor in state["model"].items():
        if "linear_qkv" in name:
            state["model"][name] = tensor.unflatten(0, (8, 3, 4)).transpose(0, 1).flatten(0, 2).clone()
    torch.save(state, path)
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(version=0)), model)


def test_interleaved_stages(tmp_path: Path) -> None:
    """Two stages of two chunks each: the first stage has layers 0 and 2, the second 1 and 3."""
    model = random_model(FAMILIES["llama"])
    convert(model, "megatron", tmp_path / "flat", WriteOptions(pp=4, divisible_by=8))
    stages = [_file(tmp_path / "flat" / "release", f"mp_rank_00_{stage:03d}") for stage in range(4)]
    for rank in range(2):
        chunks = {f"model{chunk}": stages[2 * chunk + rank]["model"] for chunk in range(2)}
        path = tmp_path / "interleaved" / "iter_0000001" / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save({"args": stages[0]["args"], "checkpoint_version": 3.0, **chunks}, path)
    assert_equal(open_model(tmp_path / "interleaved", None, ReadOptions(iteration=1)), model)


def _without_args(folder: Path) -> None:
    for path in folder.rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        torch.save({"checkpoint_version": 3.0, "model": state["model"]}, path)


def test_a_checkpoint_that_does_not_describe_itself(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "megatron", tmp_path / "out", WriteOptions(tp=2, dialect="ascendspeed"))
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    _without_args(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"does not say what model it holds.*give --hf-config"):
        open_model(tmp_path / "out", None, READ)
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf")), model)
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf" / "config.json")), model)


def test_an_unknown_vocabulary(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "megatron", tmp_path / "out", WriteOptions())
    path = tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    del state["args"].original_vocab_size
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"how many tokens .*padded: 128.*give --vocab-size"):
        open_model(tmp_path / "out", None, READ)
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(vocab_size=83)), model)


def test_objects_of_other_programs_are_not_brought_to_life(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "megatron", tmp_path / "out", WriteOptions())
    path = tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["rng_state"] = [{"path": Path("x")}]
    state["bomb"] = _Bomb(tmp_path / "exploded")
    torch.save(state, path)
    assert_equal(open_model(tmp_path / "out", None, READ), model)
    assert not (tmp_path / "exploded").exists()


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_missing_files_are_named(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "megatron", tmp_path / "out", WriteOptions(tp=2, pp=2))
    shutil.rmtree(tmp_path / "out" / "release" / "mp_rank_01_000")
    with pytest.raises(CorruptCheckpoint, match="1 of 4 files are missing: tensor-parallel rank 1 of stage 0"):
        open_model(tmp_path / "out", None, READ)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "megatron", tmp_path / "out", WriteOptions())
    path = tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptCheckpoint, match=r"cannot be read as a file of torch\.save"):
        open_model(tmp_path / "out", None, READ)


def test_copies_that_drifted_apart(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"], torch.float32)
    convert(model, "megatron", tmp_path / "out", WriteOptions(tp=2))
    path = tmp_path / "out" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"]["language_model"]["encoder"]["layers.2.input_layernorm.weight"] += 0.5
    torch.save(state, path)
    name = "layers.2.attention_norm.weight"
    with pytest.raises(CorruptCheckpoint, match=r"differs by up to 0\.5.*--average-replicas"):
        open_model(tmp_path / "out", None, READ).weights.read(name)
    averaged = open_model(tmp_path / "out", None, ReadOptions(average_replicas=True)).weights.read(name)
    torch.testing.assert_close(averaged, model.weights.read(name) + 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (WriteOptions(tp=3), "8 query heads cannot be divided over 3 ranks"),
        (WriteOptions(pp=3), "4 layers cannot be divided over 3 pipeline stages"),
        (WriteOptions(dialect="esperanto"), "--dialect esperanto: there are megatron, legacy, core"),
    ],
)
def test_refusals(options: WriteOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(random_model(FAMILIES["llama"]), "megatron", tmp_path / "out", options)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("flags", [{"tp": 0}, {"pp": -1}, {"divisible_by": 0}, {"kv_size_multiplier": 0}])
def test_numbers_that_make_no_sense(flags: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="must be at least 1"):
        WriteOptions(**flags)


def test_tied_embeddings_of_megatron_core(tmp_path: Path) -> None:
    """Its last stage has a copy of the embedding as its output layer."""
    model = random_model(FAMILIES["gpt2"])
    convert(model, "megatron", tmp_path / "out", WriteOptions(tp=2, pp=2, divisible_by=8, dialect="core"))
    assert "output_layer.weight" in _file(tmp_path / "out" / "release", "mp_rank_01_001")["model"]
    assert_equal(open_model(tmp_path / "out", None, READ), model)


def test_a_dialect_without_a_place_for_a_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"embedding\.norm\.weight has no place"):
        convert(random_model(FAMILIES["bloom"]), "megatron", tmp_path / "out", WriteOptions(dialect="core"))


def test_ascendspeed_stores_rotary_frequencies(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "megatron", tmp_path / "out", WriteOptions(tp=2, dialect="ascendspeed"))
    tensors = _file(tmp_path / "out" / "release", "mp_rank_01")["model"]
    assert tensors["language_model.layers.3.attention.rotary_emb.inv_freq"].tolist() == pytest.approx([1.0, 0.01])
    assert tensors["language_model.layers.3.mlp.gate_proj.weight"].shape == (24, 32)
