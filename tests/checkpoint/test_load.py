"""Loading in one process: what comes back, what is refused, and in which words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron.checkpoint import (
    CheckpointMismatch,
    CorruptCheckpoint,
    TrainingState,
    iteration_of_tag,
    latest,
    list_checkpoints,
    load,
    read_record,
    save,
)
from tests.checkpoint.helpers import PROGRESS, RUN, assert_holds, silent, small_state

TENSORS = {
    "model.a.weight": torch.tensor([1.0, -0.0, 3.0e38]),
    "model.half.weight": torch.tensor([[1.5, 2.5]], dtype=torch.bfloat16),
    "optimizer.exp_avg.a.weight": torch.tensor([1e-38, 2.0, 3.0]),
    "optimizer.step.a.weight": torch.tensor(3.0),
    "data.order": torch.tensor([[2**40, 1], [2, 3]], dtype=torch.int64),
}


def state(tensors: dict[str, torch.Tensor] | None = None, vocab_size: int | None = None) -> TrainingState:
    return TrainingState(
        tensors=TENSORS if tensors is None else tensors, progress=PROGRESS, run=RUN, vocab_size=vocab_size
    )


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}


def test_everything_comes_back_with_megatrons_messages(tmp_path: Path) -> None:
    said: list[str] = []
    path = save(tmp_path / "new" / "folder", 40, state(), log=said.append)
    root = path.parent
    into = zeros()
    loaded = load(root, into=into, log=said.append)
    assert loaded is not None
    assert (loaded.iteration, loaded.path, loaded.progress, loaded.run) == (40, path, PROGRESS, RUN)
    for name, tensor in TENSORS.items():
        assert torch.equal(into[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
        assert torch.equal(into[name], tensor)
    assert path.name == "iter_0000040"
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "40"
    assert said == [
        f"saving checkpoint at iteration      40 to {root}",
        f"  successfully saved checkpoint at iteration      40 to {root}",
        f" loading checkpoint from {root} at iteration 40",
        f"  successfully loaded checkpoint from {root} at iteration 40",
    ]


def test_parameters_and_views_are_filled_in_place(tmp_path: Path) -> None:
    save(tmp_path, 1, state({"model.a": torch.arange(6.0).view(2, 3).t()}), log=silent)
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    load(tmp_path, into={"model.a": parameter}, log=silent)
    assert torch.equal(parameter, torch.arange(6.0).view(2, 3).t())
    columns = torch.zeros(3, 4)
    load(tmp_path, into={"model.a": columns[:, 1:3]}, log=silent)
    assert torch.equal(columns[:, 1:3], parameter)
    assert not columns[:, 0].any()


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
    for root in (tmp_path, tmp_path / "missing"):
        assert load(root, into=zeros(), log=silent) is None
        assert read_record(root) is None
        assert latest(root) is None
        assert list_checkpoints(root) == {}


def test_an_iteration_may_be_chosen(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save(tmp_path, iteration, small_state(float(iteration)), log=silent)
    assert latest(tmp_path) == 20
    assert_holds(tmp_path, {20.0})
    record = read_record(tmp_path, iteration=10)
    assert record is not None
    assert record.progress == {"value": 10.0}
    with pytest.raises(CheckpointMismatch, match=r"no checkpoint of iteration 15 \(--ckpt-step\); there are: 10, 20"):
        load(tmp_path, iteration=15, into={}, log=silent)


def test_the_tracker_decides_and_is_not_needed(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save(tmp_path, iteration, small_state(float(iteration)), log=silent)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("10\n")
    assert_holds(tmp_path, {10.0})
    tracker.unlink()
    assert_holds(tmp_path, {20.0})


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", CorruptCheckpoint, "which is not an iteration"),
        ("1x", CorruptCheckpoint, "'1x'"),
        ("release", CheckpointMismatch, "another program"),
        ("11", CorruptCheckpoint, "iter_0000011 does not exist"),
        ("12", CorruptCheckpoint, r"iter_0000012 has no manifest.json: it is incomplete, or .* another program"),
    ],
)
def test_a_tracker_that_leads_nowhere(tmp_path: Path, text: str, error: type[Exception], words: str) -> None:
    save(tmp_path, 10, small_state(10.0), log=silent)
    (tmp_path / "iter_0000012" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(error, match=words):
        load(tmp_path, into=dict(small_state().tensors), log=silent)
    if error is CorruptCheckpoint:
        said: list[str] = []
        loaded = load(tmp_path, into=dict(small_state().tensors), fallback=True, log=said.append)
        assert loaded is not None
        assert loaded.iteration == 10
        assert "FALLING BACK" in "".join(said)


def test_one_checkpoint_instead_of_the_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 10, small_state(), log=silent)
    with pytest.raises(CheckpointMismatch, match=f"give {tmp_path} .*--ckpt-step"):
        load(path, into={}, log=silent)


def test_names_that_do_not_match(tmp_path: Path) -> None:
    save(tmp_path, 10, state(), log=silent)
    into = zeros()
    into["model.new.weight"] = into.pop("model.a.weight")
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, into=into, log=silent)
    assert "missing in the checkpoint (1): model.new.weight" in str(caught.value)
    assert "not part of this run (1): model.a.weight" in str(caught.value)
    said: list[str] = []
    assert load(tmp_path, into=into, strict=False, log=said.append) is not None
    assert any("WARNING" in line and "model.new.weight" in line for line in said)
    assert torch.equal(into["data.order"], TENSORS["data.order"])
    assert not into["model.new.weight"].any()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorch_alone_reads_the_tensors(tmp_path: Path) -> None:
    path = save(tmp_path, 10, state(), log=silent)
    nested = {"model": {"a": {"weight": torch.zeros(3)}}, "optimizer.step.a.weight": torch.zeros(())}
    dcp.load(nested, checkpoint_id=path, no_dist=True)
    assert torch.equal(nested["model"]["a"]["weight"], TENSORS["model.a.weight"])
    assert nested["optimizer.step.a.weight"] == 3


def test_sections(tmp_path: Path) -> None:
    save(tmp_path, 10, state(), log=silent)
    into = zeros()
    load(tmp_path, into=into, sections={"model"}, log=silent)
    assert torch.equal(into["model.a.weight"], TENSORS["model.a.weight"])
    assert not into["optimizer.exp_avg.a.weight"].any()


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.a.weight", torch.zeros(4), r"model.a.weight is \[3\] in the checkpoint, \[4\] here"),
        (
            "model.a.weight",
            torch.zeros(3, dtype=torch.int64),
            "model.a.weight is float32 in the checkpoint, int64 here",
        ),
        ("model.a.weight", torch.zeros(3, device="meta"), "model.a.weight has no memory here"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, tensor: torch.Tensor, words: str) -> None:
    save(tmp_path, 10, state(), log=silent)
    for strict in (True, False):
        with pytest.raises(CheckpointMismatch, match=words):
            load(tmp_path, into={**zeros(), name: tensor}, strict=strict, log=silent)


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    save(tmp_path, 10, state(), log=silent)
    with pytest.raises(CheckpointMismatch, match=r"missing in the checkpoint \(20\): .* and 12 more"):
        load(tmp_path, into={f"model.{i}.weight": torch.zeros(1) for i in range(20)}, log=silent)


def test_floating_point_values_take_the_dtype_of_the_tensor(tmp_path: Path) -> None:
    save(tmp_path, 10, state({"model.a": torch.tensor([1.0, 2.00390625])}), log=silent)
    into = {"model.a": torch.zeros(2, dtype=torch.bfloat16)}
    load(tmp_path, into=into, log=silent)
    assert into["model.a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("rows", [10, 16])
def test_padding_of_the_vocabulary(tmp_path: Path, rows: int) -> None:
    words = torch.arange(24.0).view(12, 2) + 1
    save(tmp_path, 1, state({"model.embedding.word.weight": words, "model.head.weight": words}, 10), log=silent)
    into = {f"model.{name}.weight": torch.full((rows, 2), 9.0) for name in ("embedding.word", "head")}
    load(tmp_path, into=into, vocab_size=10, log=silent)
    for tensor in into.values():
        assert torch.equal(tensor[:10], words[:10])
        assert not tensor[10:].any()


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, state({"model.head.weight": torch.zeros(12, 2)}, 10), log=silent)
    with pytest.raises(CheckpointMismatch, match=r"head\.weight has 10 words, the tokenizer of this run 11"):
        load(tmp_path, into={"model.head.weight": torch.zeros(12, 2)}, vocab_size=11, log=silent)
    with pytest.raises(CheckpointMismatch, match=r"\[10, 2\] in the checkpoint, \[8, 2\] here"):
        load(tmp_path, into={"model.head.weight": torch.zeros(8, 2)}, log=silent)
    with pytest.raises(ValueError, match="has 12 rows, fewer than the vocabulary's 13"):
        save(tmp_path, 2, state({"model.head.weight": torch.zeros(12, 2)}, 13), log=silent)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, small_state(), log=silent) / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("sha256")
    content["version"] = 2
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest}))
    with pytest.raises(CheckpointMismatch, match=r"version 2 .* reads up to 1: update"):
        load(tmp_path, into=dict(small_state().tensors), fallback=True, log=silent)


@pytest.mark.parametrize("tag", ["iter_0000100", "global_step100", "100"])
def test_tags(tag: str) -> None:
    assert iteration_of_tag(tag) == 100


def test_other_tags_are_refused() -> None:
    with pytest.raises(ValueError, match="--load-tag best"):
        iteration_of_tag("best")
