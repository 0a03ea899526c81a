"""Whole runs on the simulated devices: the losses of the CPU in several layouts, with both engines, across devices.

The runs go through the command line's own path; the ranks join each other over the device's own collective backend.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.training.metrics import read_metrics
from tests.parity import FLOAT32_TOLERANCE, MODEL, TRAINING, Curve, difference, one_process, train
from tests.sim import snapshot
from tests.sim.build import Device
from tests.sim.run import DEVICES, Counts, counted, run_on_sim
from tests.support import run_ranks

pytestmark = pytest.mark.slow

STEPS = 4
MICRO_STEPS = 8 // 2  # global over micro-batch size
BFLOAT16_TOLERANCE = 5e-3
"""Relative, of the loss: other kernels round other intermediate results to 8 bits."""

_TENSOR = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
_PIPELINE = ("--pipeline-model-parallel-size", "2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    "DP2 sharded": (2, ("--zero-stage", "3")),
    "TP2 PP2": (4, (*_TENSOR, *_PIPELINE)),
}


def _arguments(folder: Path, device: str, steps: int, flags: Sequence[str]) -> list[str]:
    return [
        *(*MODEL, *TRAINING, "--mock-data", "--train-iters", "20", "--exit-interval", str(steps)),
        *("--log-json", str(folder / "metrics.jsonl"), "--device", device, *flags),
    ]


def _losses(folder: Path) -> Curve:
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
    return Curve(tuple(r["lm_loss"] for r in records), tuple(r["grad_norm"] for r in records))


def _train(folder: Path, device: Device, ranks: int, flags: Sequence[str], steps: int = STEPS, **options: Any) -> Curve:
    run_on_sim(device, train, _arguments(folder, device, steps, flags), world_size=ranks, join=False, **options)
    return _losses(folder)


@functools.cache
def _plain(steps: int = STEPS) -> Curve:
    return one_process(MODEL, steps)


def _check(found: Curve, expected: Curve) -> None:
    assert difference(found.losses, expected.losses) <= FLOAT32_TOLERANCE
    assert difference(found.norms, expected.norms) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_run_equals_the_cpus(device, layout, tmp_path):
    ranks, flags = LAYOUTS[layout]
    _check(_train(tmp_path, device, ranks, flags), _plain())


@pytest.mark.parametrize(("device", "stage"), [("hpu", "1"), ("hpu", "3"), ("npu", "3")])
def test_deepspeed_with_its_own_accelerator_equals_the_cpus(device, stage, tmp_path):
    _check(_train(tmp_path, device, 2, ("--deepspeed", "--zero-stage", stage)), _plain())


def test_deepspeed_is_refused_where_it_has_no_accelerator(tmp_path):
    with pytest.raises(AssertionError, match="DeepSpeed has no accelerator for neuron: run without --deepspeed"):
        _train(tmp_path, "neuron", 1, ("--deepspeed",))


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_run_stays_close(device, tmp_path):
    found = _train(tmp_path, device, 1, ("--bf16",))
    assert difference(found.losses, _plain().losses) <= BFLOAT16_TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_of_the_device_continues_on_the_cpu_and_back(device, tmp_path):
    saved = ("--save", str(tmp_path / "saved"), "--save-interval", "2")
    loaded = ("--load", str(tmp_path / "saved"))
    for folder in ("first", "second", "third"):
        (tmp_path / folder).mkdir()
    first = _train(tmp_path / "first", device, 2, (*saved, *_TENSOR), steps=2)
    run_ranks(1, train, _arguments(tmp_path / "second", "cpu", 4, (*saved, *loaded)), init=False)
    third = _train(tmp_path / "third", device, 2, (*loaded, "--zero-stage", "1"), steps=6)
    joined = (*first.losses, *_losses(tmp_path / "second").losses, *third.losses)
    assert len(joined) == 6
    assert difference(joined, _plain(6).losses) <= FLOAT32_TOLERANCE


def _train_and_count(device: Device, arguments: list[str]) -> Counts:
    with counted(device) as counts:
        train(arguments)
        return counts()


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_stays_on_the_device_and_compiles_nothing(device, tmp_path):
    found = []
    for steps in (STEPS, STEPS + 1):
        (tmp_path / str(steps)).mkdir()
        arguments = _arguments(tmp_path / str(steps), device, steps, ())
        found += run_on_sim(device, _train_and_count, device, arguments, join=False)
    shorter, longer = found
    reads = {name: count - shorter.host_reads.get(name, 0) for name, count in longer.host_reads.items()}
    assert reads == {"aten::_local_scalar_dense": 2}, "the loss and the gradient norm"
    assert longer.to_host == shorter.to_host
    assert longer.to_device - shorter.to_device <= 5 * MICRO_STEPS + 3, "the batches, and numbers of the optimizer"
    if device != "npu":  # whose kernels are not compiled for the learning rate
        assert longer.new_signatures == shorter.new_signatures
    if device != "neuron":  # its vendor publishes no table of operators
        assert sorted(longer.torch_operators() - set(snapshot.read(device)["native"])) == []


def test_inputs_of_recomputed_layers_go_to_the_host_and_come_back(tmp_path):
    """One copy there and one back per layer and micro-batch."""
    found = []
    for flags in ((), ("--checkpoint-in-cpu",)):
        arguments = _arguments(tmp_path, "npu", STEPS, ("--recompute-granularity", "full", *flags))
        found += run_on_sim("npu", _train_and_count, "npu", arguments, join=False)
    kept, moved = found
    layers = 2
    assert moved.to_host - kept.to_host == STEPS * MICRO_STEPS * layers
    assert moved.to_device - kept.to_device == STEPS * MICRO_STEPS * layers
    _check(_losses(tmp_path), _plain())


def test_everything_that_layers_keep_can_go_to_the_host(tmp_path):
    _check(_train(tmp_path, "npu", 1, ("--cpu-offloading-num-layers", "2")), _plain())


def _compile(arguments: list[str]) -> Counts:
    from torch_neuronx import _compiler

    _compiler.register()
    return _train_and_count("neuron", arguments)


def test_compiled_layers_equal_the_cpus(tmp_path):
    arguments = _arguments(tmp_path, "neuron", STEPS, ("--use-torch-compile", "true"))
    (counts,) = run_on_sim("neuron", _compile, arguments, join=False)
    assert counts.events["compile"] >= 1
    _check(_losses(tmp_path), _plain())


def test_lazy_gaudi_cannot_compile(tmp_path):
    with pytest.raises(AssertionError, match=r"GAUDI2 .* lazy mode cannot compile; leave it out"):
        _train(tmp_path, "hpu", 1, ("--use-torch-compile", "true"), env={"PT_HPU_LAZY_MODE": "1"})


def test_lazy_gaudi_cuts_its_graph_once_per_micro_step_and_update(tmp_path):
    arguments = _arguments(tmp_path, "hpu", STEPS, ())
    (counts,) = run_on_sim("hpu", _train_and_count, "hpu", arguments, env={"PT_HPU_LAZY_MODE": "1"}, join=False)
    assert counts.events == {"mark_step": STEPS * (MICRO_STEPS + 1)}
    _check(_losses(tmp_path), _plain())
