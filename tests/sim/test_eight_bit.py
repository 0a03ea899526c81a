"""8-bit layers through Gaudi's (simulated) transformer engine; clipping and a profiler that only Gaudi has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron import accelerators
from megatron.ops import build_table, float8, reference
from tests.parity import MODEL, TRAINING, Layout, curve, difference, train
from tests.sim.run import counted, run_on_sim
from tests.training.test_eight_bit import ORDER
from tests.training.test_pipeline import DEEP

pytestmark = pytest.mark.slow

STEPS = 3
SUMS = 1e-6  # relative to the largest element: float32 sums of 64 products
E5M2 = ("--fp8-format", "e5m2", "--fp8-amax-history-len", "2", "--fp8-amax-compute-algo", "max")
"""With E5M2 alone the engine's backward has the same numbers as its forward, so it is the definition exactly."""
TP2_PP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2")


def _start(device: Any) -> Any:
    return lambda ranks, function, argv, timeout: run_on_sim(
        device, function, [*argv, "--device", device], world_size=ranks, join=False, timeout=timeout
    )


def _products(make: Any, device: torch.device, news: tuple[bool | None, bool | None]) -> list[np.ndarray]:
    """Results and gradients of two micro-batches; `news`: what is said of the weight of each."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).to(device).requires_grad_() for s in ((16, 2, 64), (48, 64)))
    largest = {torch.float8_e5m2: 57344.0}
    product = make(64, 48, float8.formats("e5m2", largest, weight_gradient=True))
    one, two = (torch.tensor(scale, device=device) for scale in (2.0**13, 2.0**10))
    results = []
    for scale, new in zip((2.0**20, 2.0**3), news, strict=True):  # a backward takes the scales of its own forward
        y = product(x, weight, one, two, lambda g, s=scale: torch.tensor(s, device=device), new_weight=new)
        results.append((y, scale))
    found = []
    for y, _ in reversed(results):
        gradients = torch.autograd.grad(y, (x, weight), torch.randn(y.shape, generator=generator).to(device))
        found += [tensor.detach().cpu().numpy() for tensor in (y, *gradients)]
    return found


def _on_the_card() -> tuple[list[np.ndarray], set[str]]:
    accelerator = accelerators.select("hpu")
    ops, _ = build_table(accelerator, {"make_linear": "transformer_engine"})
    with counted("hpu") as counts:
        found = _products(ops.make_linear, accelerator.set_device(0), (True, False))
        return found, set(counts().vendor())


def test_the_engine_computes_what_the_definition_says():
    ((found, operators),) = run_on_sim("hpu", _on_the_card)
    assert operators == {"cast_to_fp8_v2", "fp8_gemm_v2"}
    for mine, true in zip(found, _products(reference.make_linear, torch.device("cpu"), (None, None)), strict=True):
        assert np.abs(mine - true).max() <= SUMS * np.abs(true).max()


def test_training_equals_the_cpus_also_in_a_pipeline_with_recomputation():
    expected = curve(Layout("1 process", 1, model=DEEP), E5M2, STEPS)
    flags = (*E5M2, "--transformer-impl", "transformer_engine")
    one = curve(Layout("1 card", 1, model=DEEP), flags, STEPS, start=_start("hpu"))
    assert difference(one.losses, expected.losses) <= ORDER
    recomputed = (*flags, "--recompute-granularity", "full", "--cache-fp8-weight")
    four = curve(Layout("4 cards", 4, TP2_PP2, model=DEEP), recomputed, STEPS, start=_start("hpu"))
    assert difference(four.losses, expected.losses) <= ORDER
    assert difference(four.norms, expected.norms) <= ORDER


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--fp8-format", "e4m3"), "e4m3: Gaudi's transformer engine has E5M2 gradients; use hybrid or e5m2"),
        ((*E5M2, "--no-fp8-wgrad"), "--no-fp8-wgrad: Gaudi's transformer engine has 8-bit weight gradients"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(flags, sentence):
    with pytest.raises(AssertionError, match=sentence):
        curve(Layout("1 card", 1), flags, 1, start=_start("hpu"))


def test_devices_without_8_bit_numbers_refuse_them():
    with pytest.raises(AssertionError, match="--fp8-format e5m2: npu does not compute with 8-bit numbers here"):
        curve(Layout("1 card", 1), E5M2, 1, start=_start("npu"))


def _vendors_calls(argv: list[str]) -> set[str]:
    with counted("hpu") as counts:
        train(argv)
        return set(counts().vendor())


def _arguments(*flags: str) -> list[str]:
    return [*MODEL, *TRAINING, "--mock-data", "--train-iters", "2", "--device", "hpu", *flags]


def test_fused_clipping_runs_where_a_rank_has_all_gradients():
    (alone,) = run_on_sim("hpu", _vendors_calls, _arguments(), join=False)
    sharing = run_on_sim("hpu", _vendors_calls, _arguments(), world_size=2, join=False)
    assert "fused_clip_norm" in alone
    assert all("fused_clip_norm" not in calls and "optimizer_adamw" in calls for calls in sharing)


def _train_in(folder: Path, argv: list[str]) -> None:
    os.chdir(folder)
    train(argv)


def test_profiler_of_the_vendor(tmp_path):
    argv = _arguments("--profile", "hltv", "--profile-steps", "1,2")
    with pytest.raises(AssertionError, match="export HABANA_PROFILE=profile_api_with_nics"):
        run_on_sim("hpu", _train_in, tmp_path, argv, join=False)
    announced = {"HABANA_PROFILE": "profile_api_with_nics"}
    run_on_sim("hpu", _train_in, tmp_path, argv, join=False, env=announced)
    assert (tmp_path / "synapse_trace.json").exists()
