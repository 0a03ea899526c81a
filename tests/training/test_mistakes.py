"""What a user sees after a mistake: one clear message and a non-zero exit code, on every rank, in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.training.setup import SetupError
from tests.parity import MODEL
from tests.support import free_port, run_script

ROOT = Path(__file__).parents[2]
BATCH = (
    *("--micro-batch-size", "2", "--num-workers", "0", "--eval-iters", "0"),
    *("--lr", "1e-3", "--log-interval", "1"),
)
SECONDS_TO_NOTICE = 60.0


def _command(*flags: str) -> list[str]:
    return ["pretrain_gpt.py", *MODEL, *BATCH, "--train-iters", "30", *flags]


def _run(*flags: str, **variables: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    done = run_script(*_command(*flags), **variables)
    return done.returncode, done.stdout + done.stderr


def _corpus(folder: Path, highest: int) -> Path:
    prefix = folder / "corpus"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in (50, 70, 900):
            writer.add_document(np.arange(length, dtype=np.uint16) % (highest + 1))
    return prefix


def _assert_refused(found: tuple[int, str], words: Sequence[str]) -> None:
    code, text = found
    assert code not in (0, 134)
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, text


def test_missing_data_file(tmp_path: Path) -> None:
    _assert_refused(
        _run("--data-path", str(tmp_path / "nothing"), "--tokenizer-type", "NullTokenizer"), ["nothing.idx"]
    )


@pytest.mark.slow
def test_truncated_bin(tmp_path: Path) -> None:
    prefix = _corpus(tmp_path, 99)
    binary = Path(f"{prefix}.bin")
    binary.write_bytes(binary.read_bytes()[:-10])
    found = _run("--data-path", str(prefix), "--tokenizer-type", "NullTokenizer")
    _assert_refused(found, ["corpus.bin", "2030", "2040"])


@pytest.mark.slow
def test_wrong_magic(tmp_path: Path) -> None:
    prefix = _corpus(tmp_path, 99)
    index = Path(f"{prefix}.idx")
    index.write_bytes(b"NOTANIDX!" + index.read_bytes()[9:])
    _assert_refused(_run("--data-path", str(prefix), "--tokenizer-type", "NullTokenizer"), ["corpus.idx"])


@pytest.mark.slow
def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    prefix = _corpus(tmp_path, 300)
    found = _run("--data-path", str(prefix), "--tokenizer-type", "NullTokenizer", "--split", "1,0,0")
    _assert_refused(found, ["300", "101"])


def test_unknown_flag() -> None:
    _assert_refused(_run("--mock-data", "--micro-batchsize", "2"), ["--micro-batchsize", "--micro-batch-size"])


@pytest.mark.slow
def test_heads_and_world_size_that_do_not_fit() -> None:
    found = _run("--mock-data", "--tensor-model-parallel-size", "3", WORLD_SIZE="4")
    _assert_refused(found, ["--tensor-model-parallel-size", "3", "8", "4"])


@pytest.mark.slow
def test_a_drive_without_the_library_for_it(tmp_path: Path) -> None:
    """One process without a launcher, which DeepSpeed does not expect."""
    from megatron.training.deepspeed import import_deepspeed

    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is there, so DeepSpeed can use a drive")
    drive = {"device": "nvme", "nvme_path": str(tmp_path)}
    document = tmp_path / "ds.json"
    document.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": drive}}))
    found = _run("--mock-data", "--deepspeed", "--deepspeed_config", str(document))
    _assert_refused(found, ['offload_optimizer.device = "nvme"', "libaio", 'take "cpu"'])


def test_the_lock_of_a_compiler_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody else waits for it, without a word and without an end."""
    from megatron.training.deepspeed import check_compiler

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    check_compiler("cpu_adam")
    lock = tmp_path / "cpu_adam" / "lock"
    lock.touch()
    check_compiler("cpu_adam")
    os.utime(lock, (0, 0))
    with pytest.raises(SetupError, match=f"{lock} is [0-9]+ minutes old.*remove that file"):
        check_compiler("cpu_adam")


def test_save_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    found = _run("--mock-data", "--save", str(tmp_path / "file" / "runs"), "--save-interval", "5")
    _assert_refused(found, [str(tmp_path / "file"), "--save"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "nans"),
    [
        (("--init-method-std", "1e38", "--embedding-init-method-std", "1"), 1),  # the loss itself
        (("--lr", "1e30", "--lr-decay-style", "constant", "--clip-grad", "0"), 0),  # the gradients of a finite loss
    ],
)
def test_numbers_that_are_not_finite(flags: tuple[str, ...], nans: int) -> None:
    code, text = _run("--mock-data", *flags)
    assert code == 1
    assert "was skipped: the gradient norm is nan" in text
    assert f"number of skipped iterations:   1 | number of nan iterations:   {nans}" in text
    assert "after 20 such iterations in a row; nothing was saved. Lower --lr" in text
    assert "Traceback" not in text


def _ranks(*flags: str) -> list[subprocess.Popen[str]]:
    """Two ranks started by hand, without a launcher that would end one when the other dies."""
    port = free_port()
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, *_command("--mock-data", "--train-iters", "100000", *flags)],
            cwd=ROOT,
            env={**common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--tensor-model-parallel-size", "2"), ("--zero-stage", "1")])
def test_a_killed_rank_ends_the_others(flags: tuple[str, ...]) -> None:
    survivor, victim = processes = _ranks(*flags)
    try:
        assert victim.stdout is not None
        while "iteration " not in victim.stdout.readline():
            assert victim.poll() is None
        victim.send_signal(signal.SIGKILL)
        began = time.monotonic()
        text, _ = survivor.communicate(timeout=SECONDS_TO_NOTICE)
        assert time.monotonic() - began < SECONDS_TO_NOTICE
        assert survivor.returncode not in (0, None)
        assert "another rank has gone" in text
    finally:
        for process in processes:
            process.kill()
            process.wait()
