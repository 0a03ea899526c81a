"""What must not be saved: values that are not finite, and copies that have drifted apart."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron.checkpoint import SaveError, Saver, SaveSettings, TrainingState, list_checkpoints
from megatron.checkpoint.agreement import drifts
from megatron.checkpoint.ranks import Ranks
from tests.checkpoint.helpers import RUN, Layout, build, expected, fill, silent, tensors_of
from tests.support import run_ranks

_NORM = "model.layers.0.attention_norm.weight"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _save(root: str, iteration: int, tensors: dict[str, Tensor]) -> str:
    """What a verified save says on this rank: an error, or nothing."""
    saver = Saver(root, SaveSettings(verify=True), log=silent)
    try:
        saver.save(iteration, TrainingState(tensors=tensors, progress={}, run=RUN, vocab_size=100))
    except SaveError as error:
        return str(error)
    return ""


def _tensor_parallel(root: str) -> list[object]:
    """Three of four ranks agree on the copy of a norm; then one holds a NaN."""
    rank = int(os.environ["RANK"])
    tensors = tensors_of(build(Layout(tp=2, dp=2)))
    fill(tensors)
    answers: list[object] = [_save(root, 1, tensors)]
    if rank == 2:
        _local(tensors[_NORM])[3] += 1e-7
    answers.append(_save(root, 2, tensors))
    said: list[str] = []
    assert Saver(root, SaveSettings(), log=said.append).heal(tensors)
    assert not Saver(root, SaveSettings(), log=said.append).heal(tensors)
    assert torch.equal(_local(tensors[_NORM]), expected(_NORM, tensors[_NORM].shape))
    assert drifts(tensors, Ranks.of(None)) == []
    answers.append(_save(root, 3, tensors))
    if rank == 1:
        _local(tensors["optimizer.exp_avg.layers.1.mlp.up.weight"])[0, 0] = math.nan
    answers.append(_save(root, 4, tensors))
    return [*answers, said]


def test_only_a_state_to_be_trusted_is_saved(tmp_path: Path) -> None:
    answers = run_ranks(4, _tensor_parallel, str(tmp_path))
    assert [answer[:4] for answer in answers] == [answers[0][:4]] * 4
    good, drifted, healed, nan, said = answers[0]
    assert (good, healed) == ("", "")
    assert f"{_NORM} from [0]: ranks that should hold the same values differ: 0, 1, 3 | 2" in drifted
    assert "--heal-replica-drift" in drifted
    assert "The last good checkpoint is iteration 1" in drifted
    assert "optimizer.exp_avg.layers.1.mlp.up.weight: 1 values are NaN or infinite" in nan
    assert "The last good checkpoint is iteration 3" in nan
    assert len(said) == 1 and "HEALED" in said[0]
    assert all(answer[4] == [] for answer in answers[1:])
    assert list(list_checkpoints(tmp_path)) == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_counted_in_every_format(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([1.0, math.nan, 2.0]).to(dtype)
    answer = _save(str(tmp_path), 1, {"model.a": tensor, "model.steps": torch.tensor([3])})
    assert "model.a: 1 values are NaN or infinite" in answer
