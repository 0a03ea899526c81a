"""`python -m megatron.launch` from the outside: what a dry run prints, what is refused, what is started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SETTINGS = {
    "PRESET": "llama-tiny",
    "DEVICE": "cpu",
    "SEQ_LENGTH": "64",
    "MICRO_BATCH": "1",
    "TRAIN_ITERS": "2",
    "LR": "1e-3",
}
_FLAGS = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511")


def _launch(*flags, **variables):
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **_SETTINGS, **variables}
    command = [sys.executable, "-m", "megatron.launch", *_FLAGS, *flags]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=120)


def test_dry_run_shows_variables_settings_exports_and_command():
    done = _launch("--dry-run", "--lr", "2e-3", TP="2", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "TP=2  ->  --tensor-model-parallel-size 2" in done.stdout
    assert "LR=1e-3  ->  overridden" in done.stdout
    settings = done.stdout.partition("== settings")[2]
    assert "tensor_model_parallel_size" in settings and "0.002" in settings
    command = done.stdout.splitlines()[-1]
    assert "-m torch.distributed.run --standalone --nproc-per-node 2 --" in command
    assert command.endswith("--lr 2e-3")
    assert "OMP_NUM_THREADS" not in settings, "it was set by the user"
    assert "DeepSpeed JSON" not in done.stdout


def test_dry_run_shows_the_json_of_deepspeed():
    done = _launch("--dry-run", ENGINE="deepspeed", ZERO_STAGE="2", DP="2")
    assert done.returncode == 0, done.stderr
    json_text = done.stdout.partition("== DeepSpeed JSON")[2]
    assert '"stage": 2' in json_text and '"train_batch_size": 2' in json_text


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        (["--learning-rte", "1"], {}, "--learning-rte"),
        ([], {"TP": "3"}, "num_attention_heads|num-attention-heads|heads"),
        ([], {"TP": "2", "NPROC": "3"}, "3 processes cannot hold whole copies"),
        ([], {"ENGINE": "fast"}, "ENGINE=fast is none of native, deepspeed"),
    ],
)
def test_mistakes_are_reported_once_before_anything_starts(flags, variables, message):
    done = _launch(*flags, **variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and re.search(message, done.stderr), done.stderr


def test_a_launcher_that_is_not_installed_is_named():
    done = _launch(LAUNCHER="srun", PATH="/nonexistent")
    assert done.returncode == 2
    assert "srun cannot be started" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_train(launcher, tmp_path):
    done = _launch(LAUNCHER=launcher, TP="2", MASTER_PORT="29611", HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "iteration" in done.stdout
