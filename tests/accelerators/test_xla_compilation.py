"""What Trainium 1 would run, through the real torch_xla on its CPU: compiled once, with the losses of plain torch.

torch_xla is for torch 2.9, so it has an environment of its own; `MEGATRON_XLA_PYTHON` names its Python:

    python -m venv .venv-xla && .venv-xla/bin/pip install torch==2.9.0 torch_xla==2.9.0
    MEGATRON_XLA_PYTHON=.venv-xla/bin/python python -m pytest tests/accelerators/test_xla_compilation.py
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Sequence
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


def _run(module: str, *words: str, ranks: int = 1) -> str:
    """What a module printed, run with torch_xla on its CPU, in several processes if asked for."""
    environ = {**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [PYTHON, *start, "-m", f"tests.accelerators.{module}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _losses(device: str, name: str, folder: Path, *more: str, ranks: int = 1) -> list[float]:
    log, checkpoints = folder / name, folder / device
    words = ("--device", device, *RUN, "--log-json", str(log), "--save", str(checkpoints), *more)
    _run("xla_trainer", *words, ranks=ranks)
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


def _graphs(flags: Sequence[str]) -> tuple[list[int], list[list[tuple[str, str]]]]:
    """Compilations until the end of each step, and collectives of every graph: the same on the first and last rank."""
    first, last = (json.loads(_run("xla_ranks", str(rank), *flags)) for rank in (0, 3))
    assert first == last, "ranks that compile other collectives wait for each other forever"
    return first["compiled"], [[(kind, groups) for kind, groups in graph] for graph in first["graphs"]]


TP, DP, ALL = "{{0,1},{2,3}}", "{{0,2},{1,3}}", "{{0,1,2,3}}"
"""The groups of TP2 x DP2, as Topology has them, in XLA's words: always of all ranks."""
LAYERS, PARAMETERS = 2, 2 * 9 + 3
"""Of the model: seven matrices and two norms in each layer, the embedding, the last norm and the head."""


@pytest.mark.slow
@needs_xla
def test_graphs_of_several_cores_sum_over_the_right_ones_and_are_compiled_once():
    compiled, graphs = _graphs(())
    assert compiled[SETTLED:] == [compiled[SETTLED]] * 3
    *_, forward, last_forward, gradients, loss, norm, step = graphs
    # A layer sums two outputs and two gradients of inputs. So do the embedding and the head, once; the loss takes two.
    assert Counter(forward) == {("all-reduce", TP): 4 * LAYERS + 4, ("all-reduce", DP): 1}
    assert Counter(last_forward) == {("all-reduce", TP): 4 * LAYERS + 4}
    assert Counter(gradients) == {("all-reduce", DP): PARAMETERS}
    assert {*loss} == {("all-reduce", DP)} and ("all-reduce", ALL) in norm and ("all-reduce", ALL) in step


@pytest.mark.slow
@needs_xla
def test_graphs_with_sequence_parallelism_gather_and_scatter_among_tensor_parallel_ranks():
    _, graphs = _graphs(("--sequence-parallel",))
    found = Counter(graphs[1])
    # Forward gathers before and scatters after both halves of a layer; backward does the reverse, and gathers again.
    assert found["all-gather", TP] > 4 * LAYERS and found["reduce-scatter", TP] >= 4 * LAYERS
    assert {groups for _, groups in found} == {TP}


@pytest.mark.slow
@needs_xla
def test_four_cores_have_the_losses_of_the_cpu_and_go_on_from_its_checkpoints(tmp_path):
    plain = _losses("cpu", "plain", tmp_path)
    layout = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    lazy = _losses("neuron_xla", "lazy", tmp_path, *layout, ranks=4)
    assert len(lazy) == 6 and difference(lazy, plain) <= FLOAT32_TOLERANCE
    halfway = ("--load", str(tmp_path / "neuron_xla"), "--ckpt-step", "3")
    assert difference(_losses("cpu", "back", tmp_path, *halfway), plain[3:]) <= FLOAT32_TOLERANCE
    halfway = ("--load", str(tmp_path / "cpu"), "--ckpt-step", "3")
    resumed = _losses("neuron_xla", "resumed", tmp_path, *layout, *halfway, ranks=4)
    assert difference(resumed, plain[3:]) <= FLOAT32_TOLERANCE
