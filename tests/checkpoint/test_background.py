"""Checkpoints that a thread writes: they hold what was there when they were begun, and their errors are everyone's."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.checkpoint import SaveError, Saver, SaveSettings, TrainingState, latest, list_checkpoints, load
from tests.checkpoint.helpers import RUN, Layout, assert_exact, build, fill, silent, tensors_of
from tests.support import run_ranks

_BACKGROUND = SaveSettings(background=True, keep_last=2)


def _saver(root: str, said: list[str]) -> Saver:
    return Saver(root, _BACKGROUND, group=torch.distributed.new_group(backend="gloo"), log=said.append)


def _state(tensors: dict[str, Tensor]) -> TrainingState:
    return TrainingState(tensors=tensors, progress={}, run=RUN, vocab_size=100)


def _copies_are_written(root: str) -> list[str]:
    said: list[str] = []
    saver = _saver(root, said)
    tensors = tensors_of(build(Layout(tp=2, dp=2, fsdp=True)))
    for iteration in (1, 2, 3):  # the second and third use the memory of the one before
        fill(tensors)
        saver.save(iteration, _state(tensors))
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.fill_(float(iteration))
    saver.finish()
    saver.finish()
    for iteration in (2, 3):
        loaded = load(root, into=tensors, iteration=iteration, vocab_size=100, verify=True, log=silent)
        assert loaded is not None
        assert_exact(tensors)
    return said


def test_training_may_change_what_is_being_written(tmp_path: Path) -> None:
    said, *others = run_ranks(4, _copies_are_written, str(tmp_path))
    assert list(list_checkpoints(tmp_path)) == [2, 3]
    assert not any(others)
    text = "\n".join(said)
    assert text.count("training stood still for ") == 3
    assert text.count("successfully saved checkpoint") == 3


def _one_rank_cannot_write(root: str) -> tuple[str, list[str]]:
    said: list[str] = []
    saver = _saver(root, said)
    tensors = {f"model.{i}": torch.ones(100_000) for i in range(4)}
    saver.save(1, _state(tensors))
    saver.finish()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    saver.save(2, _state(tensors))
    with pytest.raises(SaveError) as caught:
        saver.save(3, _state(tensors))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    saver.save(4, _state(tensors))
    saver.finish()
    return str(caught.value), said


def test_an_error_is_said_at_once_and_raised_on_all_ranks_by_the_next_save(tmp_path: Path) -> None:
    (error, said), (other, silence) = run_ranks(2, _one_rank_cannot_write, str(tmp_path))
    assert error == other
    assert "cannot save the checkpoint of iteration 2" in error
    assert "rank 1: [Errno 27] File too large" in error
    assert "last good checkpoint is iteration 1" in error
    assert any(line.startswith("ERROR: iteration 2 was not saved") for line in said)
    assert silence == []
    assert list(list_checkpoints(tmp_path)) == [1, 4]
    assert latest(tmp_path) == 4
