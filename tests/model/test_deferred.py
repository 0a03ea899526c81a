"""Weight gradients that are computed later are those that backward computes at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron.model.gpt import RecomputePlan
from megatron.model.inputs import ModelInputs
from megatron.mpu.deferred import DeferredGradients
from megatron.mpu.groups import ProcessGroups, single_process
from megatron.mpu.topology import Topology
from tests.model.helpers import FAMILIES, build, groups_for, loss_of, tokens_of
from tests.support import run_ranks

TP = 2
LINEAR = ("query", "key", "value", "output", "gate", "up", "down", "head")
# In the same order of operations, but for embeddings that are also heads: two sums of gradients change places.
TOLERANCE = 1e-12
PLANS = {
    "kept": RecomputePlan(),
    "selective": RecomputePlan(granularity="selective"),
    "full": RecomputePlan(granularity="full", num_layers=2),
}


def _gradients(
    family: str, plan: str, groups: ProcessGroups, sequence_parallel: bool, *, defer: bool
) -> dict[str, np.ndarray]:
    arch, deferred = FAMILIES[family], DeferredGradients() if defer else None
    model = build(
        arch,
        groups,
        sequence_parallel=sequence_parallel,
        recompute=PLANS[plan],
        deferred=deferred,
        dtype=torch.float64,
    ).train()
    tasks = []
    for seed in range(2):
        loss_of(model, arch, groups, ModelInputs(), seed=seed).backward()
        if deferred is not None:
            tasks.append(deferred.take())
            weights = {n: p for n, p in model.named_parameters() if n.split(".")[-2] in LINEAR and p.dim() == 2}
            assert weights
            assert all(parameter.grad is None for parameter in weights.values())
    for later in tasks:
        zero = model.weight_gradients(later)
        assert zero.item() == 0.0
        zero.backward()
    if deferred is not None:
        assert not deferred.take()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def _agree(family: str, plan: str, groups: ProcessGroups, sequence_parallel: bool) -> None:
    expected = _gradients(family, plan, groups, sequence_parallel, defer=False)
    found = _gradients(family, plan, groups, sequence_parallel, defer=True)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{family} {name}")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process(family: str, plan: str) -> None:
    _agree(family, plan, single_process(), sequence_parallel=False)


def _all_families() -> None:
    for family in FAMILIES:
        groups = groups_for(FAMILIES[family], Topology(TP, tp=TP))
        for plan in ("kept", "full"):
            for sequence_parallel in (False, True):
                _agree(family, plan, groups, sequence_parallel)


@pytest.mark.slow
def test_tensor_and_sequence_parallel() -> None:
    run_ranks(TP, _all_families)


def test_logits_are_no_view() -> None:
    """FSDP warns of modules that return one."""
    logits = build(FAMILIES["llama"], deferred=DeferredGradients())(tokens_of(FAMILIES["llama"])[0], ModelInputs())
    assert logits.requires_grad and logits._base is None


def test_nothing_is_noted_down_without_gradients() -> None:
    deferred = DeferredGradients()
    model = build(FAMILIES["llama"], deferred=deferred)
    with torch.no_grad():
        loss_of(model, FAMILIES["llama"], single_process(), ModelInputs())
    assert not deferred.take()
