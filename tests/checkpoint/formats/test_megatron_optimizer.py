"""The state of Megatron's optimizers: files of megatron-core 0.16.1 are read to the bit, others refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats import ReadOptions, StoredModel, WriteOptions, convert, open_model
from megatron.checkpoint.formats.lazy import cast_view
from megatron.checkpoint.formats.merge import to_dialect
from megatron.config.experts import Experts
from tests.checkpoint.formats.samples import FAMILIES, assert_equal, random_model

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "megatron"
ARCH = replace(
    FAMILIES["llama"],
    **{"num_layers": 1, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "ffn_hidden_size": 12},
    vocab_size=16,
    padded_vocab_size=16,
    experts=Experts(count=4, topk=2, ffn_hidden_size=12, layers=(0,)),
)
READ = ReadOptions(arch=ARCH)
FIRST = Path("iter_0000002") / "mp_rank_00_000"


def _assert_is_the_truth(found: StoredModel, folder: Path) -> None:
    """Every part of every parameter that the optimizers held in memory."""
    compared = 0
    for rank in range(2):
        truth = torch.load(folder / f"truth_{rank}.pt")
        for entry, weights in {"fp32": found.weights, **found.moments}.items():
            tensors = to_dialect(found, "core", WriteOptions(divisible_by=1), weights).tensors
            for name, (start, part) in truth[entry].items():
                flat = tensors.read(name).flatten()
                assert torch.equal(flat[start : start + len(part)], part), (entry, name)
                compared += part.numel()
    assert compared >= 3 * ARCH.num_parameters()


@pytest.mark.parametrize("kind", ["distributed", "plain"])
def test_files_of_megatron_core(kind: str) -> None:
    found = open_model(GOLDEN / kind, None, READ)
    assert found.steps == 2 and found.moments.keys() == {"exp_avg", "exp_avg_sq"}
    _assert_is_the_truth(found, GOLDEN / kind)
    alone = open_model(GOLDEN / kind, None, replace(READ, optimizer=False))
    assert alone.steps is None and not alone.moments
    assert_equal(replace(found, weights=cast_view(found.weights, torch.bfloat16), moments={}), alone)


def test_written_arguments_are_of_the_new_layout(tmp_path: Path) -> None:
    """Two expert-parallel ranks are read, one is written; the second number of a folder is then a stage."""
    model = open_model(GOLDEN / "plain", None, replace(READ, optimizer=False))
    old = replace(model, settings={**model.settings, "expert_tensor_parallel_size": 4})
    convert(old, "megatron", tmp_path / "out", WriteOptions(tp=2))
    path = tmp_path / "out" / "iter_0000002" / "mp_rank_01" / "model_optim_rng.pt"
    args = torch.load(path, weights_only=False)["args"]
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (1, 2)
    assert_equal(open_model(tmp_path / "out", None, ReadOptions()), model)


def test_names_and_tensors_are_those_of_megatron_core(tmp_path: Path) -> None:
    found = open_model(GOLDEN / "plain", None, replace(READ, optimizer=False))
    convert(found, "megatron", tmp_path / "out", WriteOptions(divisible_by=1))
    ours = torch.load(tmp_path / "out" / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    for rank in range(2):
        path = GOLDEN / "plain" / "iter_0000002" / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt"
        theirs = {n: t for n, t in torch.load(path, weights_only=False)["model"].items() if t is not None}
        names = {
            n: n.replace("experts.1.", f"experts.{2 * rank + 1}.").replace("experts.0.", f"experts.{2 * rank}.")
            for n in theirs
        }
        assert all(torch.equal(ours["model"][names[name]], tensor) for name, tensor in theirs.items())
    assert len(ours["model"]) == len(theirs) + 4  # two more experts of two tensors


def _changed(folder: Path, kind: str, file: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a checkpoint with another content in one file."""
    shutil.copytree(GOLDEN / kind, folder)
    content = torch.load(folder / FIRST / file, weights_only=False)
    torch.save(change(content), folder / FIRST / file)
    return folder


def test_buffers_before_2024(tmp_path: Path) -> None:
    """One parameter right after the other, and a tensor per bucket."""
    truth = torch.load(GOLDEN / "plain" / "truth_0.pt")
    names = list(torch.load(GOLDEN / "plain" / FIRST / "model_optim_rng.pt", weights_only=False)["model"])
    entries = {"param": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

    def buffer(*, of_experts: bool) -> dict[Any, Any]:
        own = [name for name in reversed(names) if name in truth["fp32"] and ("local" in name) == of_experts]
        flats = {key: torch.cat([truth[entry][name][1] for name in own]) for key, entry in entries.items()}
        return {0: {torch.float32: {key: list(flat.split(100)) for key, flat in flats.items()}}}

    states = [buffer(of_experts=False), buffer(of_experts=True)]
    folder = _changed(tmp_path / "old", "distributed", "distrib_optim.pt", lambda _: states)
    _assert_is_the_truth(open_model(folder, None, READ), GOLDEN / "distributed")


def _mixed_up(content: Any) -> Any:
    content["model"]["output_layer.weight"] += 1
    return content


def _other_groups(content: Any) -> Any:
    first, second = content["optimizer"][0]["optimizer"]["param_groups"]
    second["params"] = [*first["params"][-1:], *second["params"]]
    first["params"] = first["params"][:-1]
    return content


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        ("distributed", "model_optim_rng.pt", _mixed_up, "cut in buckets that do not end with a multiple of 64"),
        ("distributed", "distrib_optim.pt", lambda state: [*state, state[1]], "3 optimizers"),
        ("plain", "model_optim_rng.pt", _mixed_up, r"the float32 weights of output_layer\.weight are not its own"),
        ("plain", "model_optim_rng.pt", _other_groups, "parameter"),
    ],
)
def test_an_order_that_does_not_show(
    kind: str, file: str, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    folder = _changed(tmp_path / "out", kind, file, change)
    with pytest.raises(CheckpointError, match=rf"{message}.*--ckpt-format torch_dist.*--no-optimizer"):
        open_model(folder, None, READ)


def test_missing_files(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "distributed", tmp_path / "out")
    (tmp_path / "out" / FIRST / "distrib_optim.pt").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_00_000 has no distrib_optim\.pt"):
        open_model(tmp_path / "out", None, READ)
    shutil.rmtree(tmp_path / "out" / FIRST)
    with pytest.raises(CorruptCheckpoint, match=r"1 of 2 files are missing: .* of stage 0, expert-parallel rank 0"):
        open_model(tmp_path / "out", None, READ)


def test_pieces_of_2022_are_refused(tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "megatron", tmp_path / "out", WriteOptions())
    (tmp_path / "out" / "release" / "mp_rank_00" / "optim.pt").touch()
    with pytest.raises(CheckpointError, match=r"optim\.pt, as Megatron-LM wrote it in 2022.*--no-optimizer"):
        open_model(tmp_path / "out", None, ReadOptions())
    open_model(tmp_path / "out", None, ReadOptions(optimizer=False))


def test_experts_split_otherwise_are_refused(tmp_path: Path) -> None:
    def change(content: Any) -> Any:
        content["args"].num_experts, content["args"].expert_tensor_parallel_size = 4, 4
        return content

    folder = _changed(tmp_path / "out", "plain", "model_optim_rng.pt", change)
    with pytest.raises(CheckpointError, match="experts are split over 4 tensor-parallel ranks"):
        open_model(folder, None, READ)
