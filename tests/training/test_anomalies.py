"""Losses that are not finite or far too high: what is one, and what a run does about it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.training.anomalies import AnomalyRules, AnomalyWatch
from megatron.training.engine import StepResult
from megatron.training.metrics import read_metrics
from tests.parity import FLOAT32_TOLERANCE, MODEL, TRAINING, difference, in_turn, train
from tests.support import run_ranks


def _result(loss: float = 2.0, norm: float = 1.0, skipped: bool = False, scale: float = 1.0) -> StepResult:
    return StepResult(loss=loss, grad_norm=norm, skipped=skipped, loss_scale=scale)


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (_result(), None),
        (_result(loss=math.nan), "the loss is nan"),
        (_result(loss=math.inf), "the loss is inf"),
        (_result(norm=math.inf, skipped=True), "the gradient norm is inf"),
        (_result(norm=math.inf, skipped=True, scale=2.0), None),  # float16 finds its scale
    ],
)
def test_what_is_not_finite(result: StepResult, what: str | None) -> None:
    anomaly = AnomalyWatch(AnomalyRules(on_nan="stop")).judge(result)
    assert (anomaly.what if anomaly else None) == what
    assert anomaly is None or anomaly.policy == "stop"


def test_what_is_a_spike() -> None:
    watch = AnomalyWatch(AnomalyRules(on_spike="rollback", spike_factor=3.0, spike_window=3))
    assert [watch.judge(_result(loss=loss)) for loss in (1.0, 90.0)] == [None, None]  # nothing to compare with
    assert watch.highest_loss == math.inf
    assert watch.judge(_result(loss=2.0)) is None
    assert watch.highest_loss == 6.0  # the median, which one high loss does not move
    anomaly = watch.judge(_result(loss=7.0))
    assert anomaly is not None
    assert (anomaly.what, anomaly.policy) == ("the loss of 7 is above 3 x the median of the 3 before", "rollback")
    assert watch.highest_loss == 6.0  # a spike is not compared with
    assert watch.judge(_result(loss=5.0)) is None
    watch.forget()
    assert watch.highest_loss == math.inf


def test_without_a_policy_nothing_is_a_spike() -> None:
    watch = AnomalyWatch(AnomalyRules(spike_window=1))
    assert [watch.judge(_result(loss=loss)) for loss in (1.0, 1e9)] == [None, None]


def _corpus(folder: Path) -> tuple[str, ...]:
    """Documents that are all alike, and one that is not."""
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for number in range(40):
            document = np.arange(33) % 11 if number != 20 else draw.integers(20, 90, 33)
            writer.add_document(document.astype(np.uint16))
    return ("--data-path", str(folder / "corpus"), "--split", "100,0,0", "--tokenizer-type", "NullTokenizer")


_LEARNS = ("--micro-batch-size", "1", "--global-batch-size", "1", "--lr", "1e-2", "--train-iters", "30")
_SPIKES = ("--loss-spike-factor", "20", "--loss-spike-window", "6")


def _run(folder: Path, *flags: str) -> list[tuple[int, float, int]]:
    """Iteration, loss and whether it was left out, of every step that was logged."""
    metrics = folder / "metrics.jsonl"
    argv = [*MODEL, *TRAINING, *_LEARNS, "--log-json", str(metrics), *_corpus(folder), *flags]
    run_ranks(1, train, argv, init=False)
    records = [record for record in read_metrics(metrics) if record["kind"] == "train"]
    return [(r["iteration"], r["lm_loss"], r["skipped_iterations"]) for r in records]


@pytest.mark.slow
def test_a_spike_is_trained_on_left_out_or_gone_back_from(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("plain", "skip", "rollback", "stop")]
    for folder in folders:
        folder.mkdir()
    plain = _run(folders[0])
    bad = max(range(8, 30), key=lambda at: plain[at][1])
    assert plain[bad][1] > 5.0  # nats; the others are far below 1 by then
    skip = _run(folders[1], "--on-loss-spike", "skip", *_SPIKES)
    assert [step for step in skip if step[2]] == [(bad + 1, plain[bad][1], 1)]
    assert skip[:bad] == plain[:bad]
    assert skip[bad + 1] != plain[bad + 1]
    saving = ("--save", str(tmp_path / "saved"), "--save-interval", "4")
    back = _run(folders[2], "--on-loss-spike", "rollback", *_SPIKES, *saving)
    again = {iteration: loss for iteration, loss, _ in back}  # of an iteration that was trained twice the second time
    assert sorted(again) == [iteration for iteration in range(1, 31) if iteration != bad + 1]
    assert [again[i] for i in range(1, bad + 1)] == [loss for _, loss, _ in plain[:bad]]
    # Weights, optimizer and schedule are those of a run that leaves the step out.
    assert again[bad + 2] == skip[bad + 1][1]
    with pytest.raises(AssertionError, match=f"iteration {bad + 1}: the loss of .* is above 20 x .*last checkpoint is"):
        _run(folders[3], "--on-loss-spike", "stop", *_SPIKES, "--save", str(tmp_path / "other"), "--save-interval", "4")


_PIPELINE = ("--pipeline-model-parallel-size", "2", "--pipeline-schedule", "1f1b")
_ON_TWO_RANKS = {
    "skip": (*_PIPELINE, "--on-loss-spike", "skip"),
    "pipeline": (*_PIPELINE, "--on-loss-spike", "rollback"),
    "DeepSpeed's pipeline": (*_PIPELINE, "--deepspeed", "--zero-stage", "1", "--on-loss-spike", "rollback"),
    "DeepSpeed": ("--deepspeed", "--zero-stage", "2", "--on-loss-spike", "rollback"),
    # From the checkpoint before the spike on with such a rate that each step after the first one is not finite.
    "never finite": (*_PIPELINE, "--on-nan", "rollback", "--lr", "1e38", "--override-opt-param-scheduler"),
}


@pytest.mark.slow
def test_pipelines_and_deepspeed_go_back_as_one_process_does(tmp_path: Path) -> None:
    shared = (*MODEL, *TRAINING, *_LEARNS, *_corpus(tmp_path), "--global-batch-size", "2", "--train-iters", "16")
    spikes, metrics = ("--loss-spike-factor", "4", "--loss-spike-window", "5"), {}
    runs = []
    for name, flags in _ON_TWO_RANKS.items():
        metrics[name] = tmp_path / f"{name}.jsonl"
        last = name == "never finite"
        saving = ("--save", str(tmp_path / ("skip" if last else name)), "--save-interval", "4", "--auto-resume")
        words = ("--log-json", str(metrics[name]), *saving, *(("--train-iters", "40") if last else spikes))
        runs.append([*shared, *flags, *words])
    ends = run_ranks(2, in_turn, runs, init=False)[0]
    assert ends[:-1] == [""] * 4
    assert re.search(r" is nan; the last checkpoint is of .* and the run has gone back 5 times since", ends[-1])
    records = {n: [r for r in read_metrics(path) if r["kind"] == "train"] for n, path in metrics.items()}
    skipping = {r["iteration"]: r["lm_loss"] for r in records["skip"] if not r["skipped_iterations"]}
    assert 5 < len(skipping) < 16
    for name in ("pipeline", "DeepSpeed's pipeline", "DeepSpeed"):
        assert len(records[name]) > len(skipping)  # some iterations were trained twice
        found = {r["iteration"]: r["lm_loss"] for r in records[name]}
        assert sorted(found) == sorted(skipping)
        losses = [[loss[i] for i in sorted(skipping)] for loss in (found, skipping)]
        assert difference(*losses) <= (0.0 if name == "pipeline" else FLOAT32_TOLERANCE), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", [(), ("--deepspeed", "--zero-stage", "0"), ("--deepspeed", "--zero-stage", "1")])
def test_steps_that_are_not_finite_are_left_out(engine: tuple[str, ...], tmp_path: Path) -> None:
    """A rate so high that the weights overflow at the first step: every later one is left out, or ends the run."""
    with pytest.raises(AssertionError, match="TrainingDivergedError: the loss was nan"):
        _run(tmp_path, *engine, "--lr", "1e38", "--lr-warmup-fraction", "0", "--clip-grad", "1")
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert records[0]["skipped_iterations"] == 0
    assert all(record["skipped_iterations"] == 1 for record in records[2:])
    (tmp_path / "stop").mkdir()
    with pytest.raises(AssertionError, match=r"TrainingDivergedError: iteration \d: the loss is nan \(--on-nan"):
        _run(tmp_path / "stop", *engine, "--lr", "1e38", "--lr-warmup-fraction", "0", "--on-nan", "stop")
