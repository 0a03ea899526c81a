"""DeepSpeed's folders, with the modules of a pipeline and without, and the files that DeepSpeed itself writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model
from tests.checkpoint.formats.samples import FAMILIES, MAIN_FAMILIES, assert_equal, random_model

READ = ReadOptions()
LAYOUTS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (2, 4)]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_layout_and_family(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    model = random_model(FAMILIES[family])
    convert(model, "deepspeed", tmp_path / "out", WriteOptions(tp=tp, pp=pp, divisible_by=8))
    assert len(list((tmp_path / "out" / "global_step0").glob("mp_rank_*"))) == tp * pp
    assert_equal(open_model(tmp_path / "out", None, READ), model)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_experts_have_files_of_their_own(tp: int, tmp_path: Path) -> None:
    model = random_model(FAMILIES["mixtral"])
    convert(model, "deepspeed", tmp_path / "out", WriteOptions(tp=tp, divisible_by=8))
    path = tmp_path / "out" / "global_step0"
    assert len(list(path.glob("layer_*_expert_*"))) == 4 * 4 * tp
    expert = torch.load(path / f"layer_3_expert_2_mp_rank_{tp - 1:02d}_model_states.pt")
    prefix = "language_model.encoder.layers.3.mlp.deepspeed_moe.experts.deepspeed_experts.2."
    gate, up = (model.weights.read(f"layers.3.mlp.experts.{part}.weight")[2] for part in ("gate", "up"))
    rows = slice(48 - 48 // tp, 48)
    assert torch.equal(expert[f"{prefix}dense_h_to_4h.weight"], torch.cat((gate[rows], up[rows])))
    assert expert.keys() == {f"{prefix}dense_h_to_4h.weight", f"{prefix}dense_4h_to_h.weight"}
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(optimizer=False)), model)
    next(path.glob("layer_1_expert_3_*")).unlink()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.3"):
        open_model(tmp_path / "out", None, ReadOptions(optimizer=False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2), (8, 4)])
def test_experts_in_stages(tp: int, pp: int, tied: bool, tmp_path: Path) -> None:
    """A stage numbers its layers with experts from 0 on."""
    model = random_model(replace(FAMILIES["mixtral"], tied_embeddings=tied))
    convert(model, "deepspeed", tmp_path / "out", WriteOptions(tp=tp, pp=pp, divisible_by=8))
    path = tmp_path / "out" / "global_step0"
    assert len(list(path.glob("layer_*_expert_*"))) == 4 * 4 * tp
    expert = torch.load(path / f"layer_0_expert_1_mp_rank_{tp * pp - 1:02d}_model_states.pt")
    first = 4 - 4 // pp  # layer of the last stage, which is the second module and the following
    down = model.weights.read(f"layers.{first}.mlp.experts.down.weight")[1]
    name = f"{first + 2}.mlp.deepspeed_moe.experts.deepspeed_experts.1.dense_4h_to_h.weight"
    assert torch.equal(expert[name], down[:, 48 - 48 // tp :])
    assert_equal(open_model(tmp_path / "out", None, READ), model)


@pytest.mark.parametrize("dialect", ["megatron", "ascendspeed", "modellink-merged", "pipeline-lambdas"])
@pytest.mark.parametrize("tp", [1, 2])
def test_other_dialects(dialect: str, tp: int, tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "deepspeed", tmp_path / "out", WriteOptions(tp=tp, divisible_by=8, dialect=dialect))
    assert_equal(open_model(tmp_path / "out", None, READ), model)


def test_bloom_as_bigscience_stored_it(tmp_path: Path) -> None:
    """Layers are modules 3 to L+2, the final norm is module L+4; the embedding has its norm beside it."""
    model = random_model(FAMILIES["bloom"])
    convert(model, "deepspeed", tmp_path / "out", WriteOptions(tp=2, divisible_by=8, dialect="pipeline-lambdas"))
    folder = tmp_path / "out" / "global_step0"
    layers = [path.name for path in sorted(folder.glob("layer_*-model_01-*"))]
    assert layers == [f"layer_{number:02d}-model_01-model_states.pt" for number in (1, 3, 4, 5, 6, 8)]
    embedding = torch.load(folder / layers[0])
    assert embedding.keys() == {"word_embeddings.weight", "word_embeddings.norm.weight", "word_embeddings.norm.bias"}
    assert torch.load(folder / layers[-1]).keys() == {"weight", "bias"}
    assert_equal(open_model(tmp_path / "out", None, READ), model)


def test_tensors_without_pipeline_are_nested_as_megatron_deepspeed_nests_them(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["gpt2"]), "deepspeed", tmp_path / "out", WriteOptions(dialect="megatron"))
    state = torch.load(tmp_path / "out" / "global_step0" / "mp_rank_00_model_states.pt", weights_only=False)
    language_model = state["module"]["language_model"]
    assert language_model["embedding"].keys() == {"word_embeddings", "position_embeddings"}
    assert "layers.3.mlp.dense_4h_to_h.bias" in language_model["encoder"]
    assert "output_layer" not in language_model


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="DeepSpeed has stages in pipeline modules only"):
        options = WriteOptions(pp=2, dialect="megatron")
        convert(random_model(FAMILIES["llama"]), "deepspeed", tmp_path / "out", options)
    with pytest.raises(CheckpointError, match="4 layers cannot be divided over 3"):
        convert(random_model(FAMILIES["llama"]), "deepspeed", tmp_path / "out", WriteOptions(pp=3))


@pytest.mark.parametrize(
    "name", ["layer_03-model_00-model_states.pt", "layer_03-model_01-model_states.pt", "mp_rank_00_model_states.pt"]
)
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "deepspeed", tmp_path / "out", WriteOptions(tp=2, pp=2))
    for path in (tmp_path / "out").rglob(name):
        path.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"there is no {name}"):
        open_model(tmp_path / "out", "deepspeed", READ)


@dataclass
class _Address:
    """As DeepSpeed notes where a parameter is."""

    numel: int
    start: int


def _add_optimizer(path: Path, sources: dict[str, Path], tp: int, pp: int, dp: int) -> None:
    """ZeRO files: per model-parallel rank, all parameters one after the other, cut in equal parts for `dp` ranks.

    Args:
        path: the checkpoint.
        sources: entry -> a checkpoint of the same layout with its values as weights.
        tp, pp, dp: the layout.
    """
    layers = sorted(file.name for file in path.glob("layer_*-model_00-*"))
    for stage in range(pp):
        inner = layers[1 + stage * 4 // pp : 1 + (stage + 1) * 4 // pp]
        own = [*(layers[:1] if stage == 0 else []), *inner, *(layers[5:] if stage == pp - 1 else [])]
        for rank in range(tp):
            flats: dict[str, list[torch.Tensor]] = {}
            shapes: dict[str, torch.Size] = {}
            for name in own:
                for entry, source in sources.items():
                    state = torch.load(source / name.replace("model_00", f"model_{rank:02d}"))
                    for inner_name, tensor in state.items():
                        shapes[f"{int(name[6:8])}.{inner_name}"] = tensor.shape
                        flats.setdefault(entry, []).append(tensor.float().flatten())
            mp_rank = f"mp_rank_{stage * tp + rank:02d}"
            model_file = path / f"{mp_rank}_model_states.pt"
            torch.save({**torch.load(model_file, weights_only=False), "param_shapes": [shapes]}, model_file)
            whole = {entry: torch.cat(parts) for entry, parts in flats.items()}
            for part in range(dp):
                start, stop = (at * len(whole["fp32"]) // dp for at in (part, part + 1))
                state = _zero_state({entry: flat[start:stop].clone() for entry, flat in whole.items()}, shapes, start)
                torch.save({"optimizer_state_dict": state}, path / f"zero_pp_rank_{part}_{mp_rank}_optim_states.pt")


def _zero_state(flats: dict[str, torch.Tensor], shapes: dict[str, torch.Size], start: int) -> dict[str, Any]:
    places, offset = {}, -start
    for name, shape in shapes.items():
        begin, end = max(0, offset), min(len(flats["fp32"]), offset + shape.numel())
        if begin < end:
            places[name] = _Address(end - begin, begin)
        offset += shape.numel()
    weights = flats.pop("fp32")
    return {
        "single_partition_of_fp32_groups": [weights],
        "base_optimizer_state": {"state": {0: {**flats, "step": torch.tensor(7.0)}}},
        "param_slice_mappings": [places],
    }


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 3), (2, 1, 2), (2, 2, 2), (4, 2, 1)])
def test_optimizer_of_every_layout(tp: int, pp: int, dp: int, tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"], torch.float32, moments=True)
    options = WriteOptions(tp=tp, pp=pp, divisible_by=8)
    sources = {}
    for entry, weights in {"fp32": model.weights, **model.moments}.items():
        convert(replace(model, weights=weights), "deepspeed", tmp_path / entry, options)
        sources[entry] = tmp_path / entry / "global_step7"
    _add_optimizer(sources["fp32"], sources, tp, pp, dp)
    found = open_model(tmp_path / "fp32", None, READ)
    assert_equal(found, model)
    assert found.steps == 7
    next(sources["fp32"].glob("zero_pp_rank_0_*")).unlink()
    if dp > 1:
        with pytest.raises(CorruptCheckpoint, match="no optimizer file of data-parallel ranks"):
            open_model(tmp_path / "fp32", None, READ)
