"""`python -m megatron.launch`: what a dry run prints, what is refused, what is started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.launch.__main__ import main
from tests.support import free_port

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


@pytest.fixture
def launch(capsys):
    """The exit code, output and error output of a launch that does not become another program."""

    def call(*flags, **variables):
        code = main([*_FLAGS, *flags], {**_SETTINGS, **variables})
        return code, *capsys.readouterr()

    return call


def test_dry_run_shows_variables_settings_exports_and_command(launch):
    code, out, err = launch("--dry-run", "--lr", "2e-3", TP="2", OMP_NUM_THREADS="1")
    assert (code, err) == (0, "")
    assert "TP=2  ->  --tensor-model-parallel-size 2" in out
    assert "LR=1e-3  ->  overridden" in out
    settings = out.partition("== settings")[2]
    assert "tensor_model_parallel_size" in settings and "0.002" in settings
    command = out.splitlines()[-1]
    assert "-m torch.distributed.run --standalone --nproc-per-node 2 --" in command
    assert command.endswith("--lr 2e-3")
    assert "OMP_NUM_THREADS" not in settings, "it was set by the user"
    assert "DeepSpeed JSON" not in out


def test_dry_run_shows_the_json_of_deepspeed(launch):
    code, out, err = launch("--dry-run", ENGINE="deepspeed", ZERO_STAGE="2", DP="2")
    assert (code, err) == (0, "")
    json_text = out.partition("== DeepSpeed JSON")[2]
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
def test_mistakes_are_reported_once_before_anything_starts(launch, flags, variables, message):
    code, out, err = launch(*flags, **variables)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and re.search(message, err), err


def test_a_launcher_that_is_not_installed_is_named(launch):
    code, _, err = launch(LAUNCHER="srun", PATH="/nonexistent")
    assert code == 2
    assert "srun cannot be started" in err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_train(launcher, tmp_path):
    inherited = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    chosen = {"LAUNCHER": launcher, "TP": "2", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-m", "megatron.launch", *_FLAGS],
        env={**inherited, **_SETTINGS, **chosen},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "iteration" in done.stdout
