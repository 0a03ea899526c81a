"""Whole runs on one GPU against the same runs on the CPU, through the command line's own path."""

from __future__ import annotations

import functools

import pytest

from tests.continuation import ROUNDED_TOLERANCE
from tests.parity import ENGINES, FLOAT32_TOLERANCE, Curve, Layout, curve, difference

pytestmark = pytest.mark.gpu

EIGHT_BIT_TOLERANCE = 2e-2
"""Relative, of the loss: numbers of 3 and 2 bits behind the point, rounded from values that differ in the last bit."""


def _train(device: str, *flags: str, steps: int = 20) -> Curve:
    return curve(Layout("1 process", 1), (*flags, "--device", device), steps)


@functools.cache
def _cpu(*flags: str, steps: int = 20) -> Curve:
    return _train("cpu", *flags, steps=steps)


def _distance(found: Curve, expected: Curve) -> float:
    return max(difference(found.losses, expected.losses), difference(found.norms, expected.norms))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_equals_the_cpus(engine: str) -> None:
    assert _distance(_train("cuda", *ENGINES[engine]), _cpu()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("flags", [("--recompute-granularity", "full"), ("--optimizer", "fusedadamw")], ids=" ".join)
def test_options_equal_the_cpus(flags: tuple[str, ...]) -> None:
    assert _distance(_train("cuda", *flags), _cpu()) <= FLOAT32_TOLERANCE


def test_compiled_layers_equal_the_cpus() -> None:
    assert _distance(_train("cuda", "--use-torch-compile"), _cpu()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("engine", ["native stage 0", "native stage 3", "DeepSpeed ZeRO-2"])
def test_bfloat16_stays_close(engine: str) -> None:
    found = _train("cuda", "--bf16", *ENGINES[engine])
    assert difference(found.losses, _cpu().losses) <= ROUNDED_TOLERANCE


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_eight_bits_stay_close(recipe: str) -> None:
    flags = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe)
    found = _train("cuda", *flags)
    assert difference(found.losses, _cpu().losses) <= EIGHT_BIT_TOLERANCE


def test_a_checkpoint_goes_on_where_it_came_from_and_on_the_other_device(tmp_path) -> None:
    """Saved by the GPU, continued by the CPU, continued by the GPU with DeepSpeed."""
    folder = ("--save", str(tmp_path), "--save-interval", "5", "--load", str(tmp_path))
    found = [
        _train("cuda", *folder, steps=5),
        _train("cpu", *folder, steps=10),
        _train("cuda", *folder, *ENGINES["DeepSpeed ZeRO-1"], steps=15),
    ]
    losses = [loss for part in found for loss in part.losses]
    assert difference(losses, _cpu(steps=15).losses) <= FLOAT32_TOLERANCE
