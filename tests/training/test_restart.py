"""Runs that were interrupted or whose last checkpoint is damaged go on by themselves, from what is good."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from megatron.checkpoint import list_checkpoints
from megatron.checkpoint.folder import TRACKER
from megatron.launch.command import Job, torchrun
from megatron.training.metrics import read_metrics
from tests.checkpoint.kills import kill
from tests.checkpoint.test_damaged import KINDS, flip_bit
from tests.parity import FLOAT32_TOLERANCE, MODEL, TRAINING, difference, in_turn, train
from tests.support import run_ranks

ROOT = Path(__file__).parents[2]
_SECONDS = 240.0


def _words(folder: Path, *flags: str, iterations: int = 6, interval: int = 2) -> list[str]:
    return [
        *(
            *MODEL,
            *TRAINING,
            "--mock-data",
            "--train-iters",
            str(iterations),
            "--log-json",
            str(folder / "metrics.jsonl"),
        ),
        *("--save", str(folder / "saved"), "--save-interval", str(interval), "--auto-resume", *flags),
    ]


def _losses(folder: Path) -> dict[int, float]:
    return {r["iteration"]: r["lm_loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"}


def _resumed_at(folder: Path) -> int:
    return [r["iteration"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "start"][-1]


@pytest.mark.slow
def test_a_flipped_bit_costs_one_checkpoint_and_no_run(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run_ranks(1, train, _words(first), init=False)
    expected = _losses(first)
    folders = []
    for kind in (*KINDS, TRACKER):
        folder = tmp_path / kind
        shutil.copytree(first, folder)
        flip_bit(folder / "saved" / kind if kind == TRACKER else folder / "saved" / "iter_0000006" / kind)
        folders.append(folder)
    refusing = tmp_path / "refusing"
    shutil.copytree(folders[0], refusing)
    runs = [*(_words(folder) for folder in folders), _words(refusing, "--no-load-fallback")]
    [ends] = run_ranks(1, in_turn, runs, init=False)
    assert ends[:-1] == [""] * len(folders)
    assert ends[-1].startswith("CorruptCheckpoint: ") and "__0_0.distcp: contents have changed" in ends[-1]
    for kind, folder in zip((*KINDS, TRACKER), folders, strict=True):
        # In the tracker "6" becomes "2", which is a checkpoint, too.
        assert _resumed_at(folder) == (2 if kind == TRACKER else 4), kind
        assert _losses(folder) == expected, kind
        assert list(list_checkpoints(folder / "saved")) == [2, 4, 6]


@pytest.mark.slow
def test_torchrun_starts_again_and_the_run_goes_on(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    run_ranks(2, train, _words(undisturbed, iterations=120, interval=5), init=False, timeout=_SECONDS)
    script = ("pretrain_gpt.py", *_words(disturbed, "--async-save", "--keep-last", "2", iterations=120, interval=5))
    command = torchrun(Job(script=script, processes=2, exports={}, max_restarts=1))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        _wait_for(disturbed / "saved" / TRACKER)
        os.kill(max(_children(process.pid)), signal.SIGKILL)
        _, said = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, said
    assert 5 <= _resumed_at(disturbed) < 120
    assert _losses(disturbed) == _losses(undisturbed)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


def _children(parent: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
def test_killed_ranks_lose_nothing(tmp_path: Path) -> None:
    """A few of the kills that `python -m tests.checkpoint.kills` makes; half of them while a thread writes."""
    findings = kill(4, seed=7, folder=tmp_path, modes=("async",))
    assert findings.kills == 4
    assert findings.runs_finished >= 1


@pytest.mark.slow
def test_fewer_processes_go_on_with_the_batch_of_what_more_have_saved(tmp_path: Path) -> None:
    def words(folder: str, *flags: str) -> list[str]:
        given = _words(tmp_path / folder, *flags)
        at = given.index("--global-batch-size")
        return given[:at] + given[at + 2 :]

    whole, parts = words("whole"), words("parts", "--exit-interval", "4")
    assert run_ranks(2, in_turn, [whole, parts], init=False) == [["", ""]] * 2
    assert list(list_checkpoints(tmp_path / "parts" / "saved")) == [2, 4]
    [[refused, done]] = run_ranks(1, in_turn, [words("parts", "--micro-batch-size", "3"), words("parts")], init=False)
    assert refused.startswith("CheckpointError: ") and "--global-batch-size 4: must be a multiple of 3" in refused
    assert (done, _resumed_at(tmp_path / "parts")) == ("", 4)
    found, expected = _losses(tmp_path / "parts"), _losses(tmp_path / "whole")
    assert list(found) == list(expected)
    assert difference(list(found.values()), list(expected.values())) <= FLOAT32_TOLERANCE


_TENSOR = ("--tensor-model-parallel-size", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (*_TENSOR, "--sequence-parallel", "--bf16", "--use-distributed-optimizer"),
        (*_TENSOR, "--deepspeed", "--zero-stage", "2", "--bf16"),
        ("--pipeline-model-parallel-size", "2", "--zero-stage", "0"),
    ],
    ids=["native", "deepspeed", "pipeline"],
)
def test_verified_and_written_by_a_thread_the_run_goes_on_to_the_last_bit(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(4, train, _words(whole, *flags), init=False, timeout=_SECONDS)
    safe = (*flags, "--async-save", "--verify-checkpoint", "--heal-replica-drift")
    for more in (("--exit-interval", "3"), ()):
        run_ranks(4, train, _words(parts, *safe, *more), init=False, timeout=_SECONDS)
    assert _resumed_at(parts) == 3
    assert _losses(parts) == _losses(whole)


@pytest.mark.slow
def test_a_kill_switch_saves_and_ends_the_run(tmp_path: Path) -> None:
    switch = tmp_path / "switch"

    def throw() -> None:
        _wait_for(tmp_path / "saved" / TRACKER)
        switch.touch()

    threading.Thread(target=throw, daemon=True).start()
    run_ranks(2, train, _words(tmp_path, "--kill-switch-path", str(switch), iterations=100_000), init=False)
    last = max(_losses(tmp_path))
    assert 2 <= last < 100_000
    assert max(list_checkpoints(tmp_path / "saved")) == last
