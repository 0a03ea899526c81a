"""Whole runs through the command line's own path: what is written, when it stops, what the flags change."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint import list_checkpoints
from megatron.training.metrics import read_metrics
from tests.parity import MODEL, TRAINING, train
from tests.support import run_ranks

ITERATIONS = 6


def _train(
    folder: Path, *flags: str, ranks: int = 1, iterations: int = ITERATIONS, timeout: float = 180.0
) -> list[Any]:
    """Records of a run; flags given later win."""
    metrics = folder / "metrics.jsonl"
    argv = [*MODEL, *TRAINING, "--log-json", str(metrics)]
    argv += [] if "--train-samples" in flags else ["--train-iters", str(iterations)]
    argv += [] if "--data-path" in flags else ["--mock-data"]
    run_ranks(ranks, train, [*argv, *flags], init=False, timeout=timeout)
    return read_metrics(metrics)


def _of(records: Sequence[Any], kind: str) -> list[Any]:
    return [record for record in records if record["kind"] == kind]


def test_a_run_writes_what_it_was_asked_for(tmp_path: Path) -> None:
    records = _train(
        tmp_path,
        *("--save", str(tmp_path / "saved"), "--save-interval", "2", "--keep-last", "2"),
        *("--tensorboard-dir", str(tmp_path / "curves"), "--log-validation-ppl-to-tensorboard"),
        *("--eval-interval", "3", "--eval-iters", "2", "--log-params-norm", "--log-num-zeros-in-grad"),
        *("--timing-log-level", "2", "--log-timers-to-tensorboard", "--profile", "pt", "--profile_steps", "2,3"),
    )
    steps = _of(records, "train")
    assert [record["iteration"] for record in steps] == list(range(1, ITERATIONS + 1))
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"]
    assert all(record["params_norm"] > 0 and record["num_zeros"] >= 0 for record in steps)
    evaluations = [(record["iteration"], record["split"]) for record in _of(records, "evaluation")]
    assert evaluations == [(3, "validation"), (6, "validation"), (6, "validation"), (6, "test")]
    assert list(list_checkpoints(tmp_path / "saved")) == [4, 6]
    record = json.loads((tmp_path / "saved" / "iter_0000006" / "run.json").read_text())
    assert record["settings"]["hidden_size"] == 64
    assert any((tmp_path / "curves").glob("events.out.tfevents*"))
    assert (tmp_path / "curves" / "profile" / "rank0.trace.json").stat().st_size > 0


@pytest.mark.slow
def test_an_interval_to_leave_after_does_not_end_a_run_that_has_just_begun_again(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    flags = ("--exit-interval", "2", "--save", saved, "--save-interval", "2", "--load", saved)
    for expected in ([1, 2], [1, 2, 3, 4]):
        steps = _of(_train(tmp_path, *flags), "train")
        assert [record["iteration"] for record in steps] == expected


@pytest.mark.slow
def test_whole_validation_set_once_with_its_last_batch_filled_up(tmp_path: Path) -> None:
    length = ("--seq-length", "512", "--max-position-embeddings", "512")
    flags = ("--eval-iters", "-1", "--eval-interval", "100", *length)
    small = ("--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--num-key-value-heads", "2")
    data = _small_corpus(tmp_path)
    one = _train(tmp_path / "1", *flags, *small, *data, iterations=1)
    two = _train(tmp_path / "2", *flags, *small, *data, iterations=1, ranks=2)
    losses = [[record["lm_loss"] for record in _of(records, "evaluation")] for records in (one, two)]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def _small_corpus(folder: Path) -> tuple[str, ...]:
    import numpy as np

    from megatron.data.indexed_writer import IndexedDatasetWriter

    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for _ in range(30):
            writer.add_document(draw.integers(0, 100, 600, dtype=np.uint16))
    return ("--data-path", str(folder / "corpus"), "--split", "60,20,20", "--tokenizer-type", "NullTokenizer")


def test_batch_size_ramps_up(tmp_path: Path) -> None:
    records = _train(tmp_path, "--rampup-batch-size", "2", "2", "12", "--train-samples", "40")
    sizes = [record["global_batch_size"] for record in _of(records, "train")]
    assert sizes == sorted(sizes)
    assert sizes[0] == 2
    assert sizes[-1] == 8
    assert records[-1]["consumed_samples"] == sum(sizes)


@pytest.mark.slow
def test_float16_skips_the_steps_that_overflow(tmp_path: Path) -> None:
    steps = _of(_train(tmp_path, "--fp16", "--initial-loss-scale", str(2.0**40), "--hysteresis", "1"), "train")
    assert steps[0]["skipped_iterations"] == 1
    assert steps[1]["loss_scale"] == steps[0]["loss_scale"] / 2
    assert steps[0]["lm_loss"] > 0


@pytest.mark.slow
def test_iterations_can_be_skipped_and_training_left_out(tmp_path: Path) -> None:
    steps = _of(_train(tmp_path / "a", "--iterations-to-skip", "2", "3"), "train")
    assert [record["iteration"] for record in steps] == [1, 4, 5, 6]
    records = _train(tmp_path / "b", "--skip-train", "--eval-iters", "2")
    assert [record["kind"] for record in records] == ["start", "evaluation", "evaluation"]


@pytest.mark.slow
def test_a_signal_saves_and_ends_the_run(tmp_path: Path) -> None:
    saved = tmp_path / "saved"

    def interrupt() -> None:
        metrics = tmp_path / "metrics.jsonl"
        while not metrics.exists() or '"iteration": 3' not in metrics.read_text():
            time.sleep(0.05)
        for process in _children():
            os.kill(process, signal.SIGUSR1)

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    flags = ("--exit-signal-handler", "--exit-signal", "SIGUSR1", "--save", str(saved), "--save-interval", "100000")
    records = _train(tmp_path, *flags, iterations=100_000, ranks=2)
    last = records[-1]["iteration"]
    assert 3 <= last < 100_000
    assert list(list_checkpoints(saved)) == [last]


def _children() -> list[int]:
    """The worker processes of this test: children of its fork server."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            grandparent = int(Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if grandparent == os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(tmp_path: Path) -> None:
    plain = _of(_train(tmp_path / "a", "--bf16"), "train")
    compiled = _of(_train(tmp_path / "b", "--bf16", "--use-torch-compile", "true", timeout=400), "train")
    for found, expected in zip(compiled, plain, strict=True):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--cpu_torch_adam",), ()], ids=["torch", "deepspeed"])
def test_deepspeed_offloads_the_optimizer_to_the_host(flags: tuple[str, ...], tmp_path: Path) -> None:
    document = tmp_path / "ds.json"
    document.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    plain = _of(_train(tmp_path / "a", "--deepspeed", "--zero-stage", "2", ranks=2), "train")
    offloading = ("--deepspeed", "--deepspeed_config", str(document), "--cpu-optimizer", *flags)
    offloaded = _of(_train(tmp_path / "b", *offloading, ranks=2, timeout=500), "train")
    for found, expected in zip(offloaded, plain, strict=True):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_gives_its_settings_and_its_weights(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    first = _of(_train(tmp_path / "a", "--save", saved, "--save-interval", "3"), "train")
    loading = ("--load", saved, "--exit-on-missing-checkpoint")
    fine = _of(_train(tmp_path / "b", *loading, "--finetune", "--num-workers", "0"), "train")
    assert fine[0]["iteration"] == 1
    assert fine[0]["lm_loss"] < first[0]["lm_loss"]
    again = _of(_train(tmp_path / "c", *loading, "--ckpt-step", "3"), "train")
    assert [record["lm_loss"] for record in again] == [record["lm_loss"] for record in first[3:]]
    metrics = tmp_path / "d" / "metrics.jsonl"
    argv = [*TRAINING, "--mock-data", "--use-checkpoint-args", *loading, "--ckpt-step", "3", "--log-json", str(metrics)]
    argv += ["--attention-dropout", "0", "--hidden-dropout", "0"]  # training settings, which a checkpoint does not give
    run_ranks(1, train, [*argv, "--train-iters", str(ITERATIONS)], init=False)
    assert [r["lm_loss"] for r in _of(read_metrics(metrics), "train")] == [r["lm_loss"] for r in first[3:]]
