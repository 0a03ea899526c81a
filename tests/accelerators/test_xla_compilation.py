"""What Trainium 1 would run, through the real torch_xla on its CPU: compiled once, with the losses of plain torch.

torch_xla is for torch 2.9, so it has an environment of its own; `MEGATRON_XLA_PYTHON` names its Python:

    python -m venv .venv-xla && .venv-xla/bin/pip install torch==2.9.0 torch_xla==2.9.0
    MEGATRON_XLA_PYTHON=.venv-xla/bin/python python -m pytest tests/accelerators/test_xla_compilation.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron.training.compare import read_curve
from tests.parity import FLOAT32_TOLERANCE, MODEL, TRAINING, difference

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MEGATRON_XLA_PYTHON", "")
SETTLED = 1
"""Steps until every graph was seen: the first one makes the state of the optimizer."""
RUN = (*MODEL, *TRAINING, "--mock-data", "--train-iters", "6", "--save-interval", "3")
needs_xla = pytest.mark.skipif(not PYTHON, reason="MEGATRON_XLA_PYTHON does not name a Python with torch_xla")


def _run(module: str, *words: str) -> str:
    """What a module printed, run with torch_xla on its CPU."""
    environ = {**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-m", f"tests.accelerators.{module}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _losses(device: str, name: str, folder: Path, *more: str) -> list[float]:
    log, checkpoints = folder / name, folder / device
    _run("xla_trainer", "--device", device, *RUN, "--log-json", str(log), "--save", str(checkpoints), *more)
    return list(read_curve(log).losses.values())


@pytest.mark.slow
@needs_xla
def test_steps_are_compiled_once_and_give_the_losses_of_plain_torch():
    found = json.loads(_run("xla_steps"))
    assert difference(found["lazy"], found["plain"]) <= FLOAT32_TOLERANCE
    assert len(found["compiled"]) == 20 and found["compiled"][0] > 0
    assert len(set(found["compiled"][SETTLED:])) == 1, found["compiled"]


@pytest.mark.slow
@needs_xla
def test_the_trainer_gives_the_losses_of_the_cpu_and_goes_on_from_its_checkpoints(tmp_path):
    plain = _losses("cpu", "plain", tmp_path)
    lazy = _losses("neuron_xla", "lazy", tmp_path)
    assert len(lazy) == 6 and difference(lazy, plain) <= FLOAT32_TOLERANCE
    halfway = ("--load", str(tmp_path / "cpu"), "--ckpt-step", "3")
    resumed = _losses("neuron_xla", "resumed", tmp_path, *halfway)
    assert difference(resumed, plain[3:]) <= FLOAT32_TOLERANCE
