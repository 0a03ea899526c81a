"""Every example is thin, runs dry, and the smallest one runs for real from text to picture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("**/*.sh"))
MAX_SETTING_LINES = 25

# The launches of the others are kept in tests/golden/launch and need no second start of Python each.
_REAL = [script for script in SCRIPTS if script.parent.name in ("cpu", "gpu") and script.name == "run_llama.sh"]

# What a reader brings to each example.
_OWN = {"DATA_PATH": "mine_text_document", "TOKENIZER_MODEL": "my_tokenizer", "NUM_GPUS": "8"}


def _run(script, *flags, timeout=120, **variables):
    environ = {**os.environ, "MEGATRON_PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(script), *flags],
        cwd="/",
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_example_is_settings_and_one_command(script):
    lines = [line for line in script.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= MAX_SETTING_LINES
    statements = "\n".join(lines).replace("\\\n", "").splitlines()
    assert statements[0] == "set -euo pipefail" and statements[-1].startswith("exec ")
    assert not [line for line in statements if line.split()[0] in ("if", "for", "while", "case", "function")]


@pytest.mark.parametrize("script", _REAL, ids=lambda path: path.parent.name)
def test_example_runs_dry_from_any_folder(script):
    done = _run(script, "--dry-run", **_OWN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "megatron.launch" in done.stdout or "torch.distributed.run" in done.stdout


def test_gpu_example_says_what_it_needs():
    done = _run(ROOT / "examples" / "gpu" / "run_llama.sh", DATA_PATH="", TOKENIZER_MODEL="")
    assert done.returncode != 0
    assert "DATA_PATH: set it to the prefix" in done.stderr


@pytest.mark.slow
def test_cpu_example_from_text_to_picture_and_again(tmp_path):
    text = tmp_path / "mine.jsonl"
    text.write_text('{"text": "def add(one, other):\\n    return one + other\\n"}\n' * 400)
    settings = {
        "OUTPUT_DIR": str(tmp_path / "out"),
        "DATA_PATH": str(text),
        "PRESET": "llama-tiny",
        "SEQ_LENGTH": "32",
        "GLOBAL_BATCH": "8",
        "TRAIN_ITERS": "8",
        "LR_WARMUP_ITERS": "2",
        "LOG_INTERVAL": "1",
        "EVAL_INTERVAL": "4",
    }
    script = ROOT / "examples" / "cpu" / "run_llama.sh"
    first = _run(script, timeout=400, **settings)
    assert first.returncode == 0, first.stdout[-6000:] + first.stderr[-6000:]
    out = tmp_path / "out"
    written = {"loss.png", "metrics.jsonl", "tensorboard", "checkpoints", "sample.txt"}
    assert written <= {path.name for path in out.iterdir()}
    assert "loss: " in first.stdout and str(out / "loss.png") in first.stdout
    again = _run(script, timeout=60, **settings)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 6
