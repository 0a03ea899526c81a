"""A small run that tests start on several nodes, and the check that it has the losses of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron.training.compare import compare, read_curve
from tests.launch.recorded import ROOT
from tests.parity import FLOAT32_TOLERANCE

LAUNCH = (sys.executable, "-m", "megatron.launch")
SMALL = {"PRESET": "llama-tiny", "SEQ_LENGTH": "32", "MICRO_BATCH": "2", "GLOBAL_BATCH": "8", "TRAIN_ITERS": "3"}
FLAGS = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511", "--log-interval", "1")
SECONDS = 300
"""After which a run hangs."""


def environment(**variables: str) -> dict[str, str]:
    """Of a launch on the CPU."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DEVICE": "cpu", "LR": "1e-3", **variables}


def start(command: tuple[str, ...] | list[str], **variables: str) -> subprocess.Popen[str]:
    """Run a command with these variables; its group of processes is a job of a shell's own."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def has_losses_of_one_process(metrics: Path) -> bool:
    """Whether the small run, whose log of JSON lines this is, has the losses of the same run in one process."""
    alone = metrics.with_suffix(".one")
    run = start([*LAUNCH, *FLAGS, "--log-json", str(alone)], **SMALL)
    said = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, said
    one, several = read_curve(alone), read_curve(metrics)
    assert len(one.losses) == int(SMALL["TRAIN_ITERS"])
    return compare(one, several, threshold=FLOAT32_TOLERANCE).passed
