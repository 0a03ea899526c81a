"""The model on a GPU computes what it computes on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.config.architecture import Architecture
from megatron.model.gpt import ModelInputs, RecomputePlan
from megatron.mpu.groups import single_process
from tests.model.helpers import FAMILIES, build, gradient_errors, loss_of

pytestmark = pytest.mark.gpu

# Sums in another order, in float64.
TOLERANCE = 1e-10


def _step(arch: Architecture, device: str, recompute: RecomputePlan | None = None) -> tuple[float, dict[str, Tensor]]:
    model = build(arch, dtype=torch.float64, recompute=recompute).to(device).train()
    loss = loss_of(model, arch, single_process(), ModelInputs(dropout_seed=5))
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_cpu(family: str) -> None:
    loss, gradients = _step(FAMILIES[family], "cuda")
    expected_loss, expected = _step(FAMILIES[family], "cpu")
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert max(gradient_errors(gradients, expected).values()) < TOLERANCE


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_draws_the_same_masks(granularity: str) -> None:
    arch = replace(FAMILIES["llama"], attention_dropout=0.2, hidden_dropout=0.3)
    loss, gradients = _step(arch, "cuda", RecomputePlan(granularity=granularity))
    expected_loss, expected = _step(arch, "cuda")
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert max(gradient_errors(gradients, expected).values()) < TOLERANCE
