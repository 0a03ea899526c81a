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

from tests.parity import FLOAT32_TOLERANCE, difference

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MEGATRON_XLA_PYTHON", "")
SETTLED = 1
"""Steps until every graph was seen: the first one makes the state of the optimizer."""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="MEGATRON_XLA_PYTHON does not name a Python with torch_xla")
def test_steps_are_compiled_once_and_give_the_losses_of_plain_torch():
    environ = {**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [PYTHON, "-m", "tests.accelerators.xla_steps"]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert difference(found["lazy"], found["plain"]) <= FLOAT32_TOLERANCE
    assert len(found["compiled"]) == 20 and found["compiled"][0] > 0
    assert len(set(found["compiled"][SETTLED:])) == 1, found["compiled"]
