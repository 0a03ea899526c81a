"""Tensor and sequence parallelism and FSDP give the loss and every gradient of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard

from megatron.model.gpt import GPT, ModelInputs, RecomputePlan
from megatron.model.weights import initialise_parameters, to_dtensors
from megatron.mpu.groups import ProcessGroups, build_groups, single_process
from megatron.mpu.sharding import is_replicated_kv, kv_copies, shard_dim
from megatron.mpu.topology import Topology
from megatron.ops import reference_ops
from tests.model.helpers import FAMILIES, SEED, build, gradient_errors, groups_for, loss_of, relative_error
from tests.support import run_ranks

WORLD = 4
# Sums in another order, in float64; "variants" keeps its residual stream in float64 too.
TOLERANCE = 1e-10
LAYOUTS = ((2, False), (2, True), (4, False), (4, True))
INPUTS = {
    "plain": ModelInputs(),
    "documents": ModelInputs(
        position_ids=torch.tensor([[*range(10), *range(6)]] * 3), document_ids=torch.tensor([[0] * 10 + [1] * 6] * 3)
    ),
    "dropout": ModelInputs(dropout_seed=5),
}
Result = tuple[float, dict[str, np.ndarray]]


def _run(family: str, kind: str, tp: int = 1, sequence_parallel: bool = False) -> Result:
    """Loss, and this rank's gradients."""
    arch = FAMILIES[family]
    groups = groups_for(arch, Topology(WORLD, tp=tp)) if tp > 1 else single_process()
    if kind == "dropout":  # masks of attention weights depend on how heads are split
        arch = replace(arch, hidden_dropout=0.2)
    model = build(arch, groups, sequence_parallel=sequence_parallel, dtype=torch.float64).train()
    loss = loss_of(model, arch, groups, INPUTS[kind])
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def _run_all(cases: list[tuple[str, str, int, bool]]) -> list[Result]:
    return [_run(*case) for case in cases]


def _joined(parts: list[dict[str, np.ndarray]], copies: int) -> dict[str, torch.Tensor]:
    """Logical gradients from those of the ranks of one tensor-parallel group, with copies of key-value heads."""
    result = {}
    for name in parts[0]:
        dim = shard_dim(name)
        alike = len(parts) if dim is None else copies if is_replicated_kv(name, copies) else 1
        for at, part in enumerate(parts):
            np.testing.assert_allclose(part[name], parts[at // alike * alike][name], rtol=0, atol=1e-12)
        result[name] = torch.from_numpy(np.concatenate([part[name] for part in parts[::alike]], axis=dim or 0))
    return result


@pytest.fixture(scope="module")
def parallel() -> dict[tuple[str, str, int, bool], list[Result]]:
    """Results of all ranks for every case, from one set of processes."""
    cases = [
        (family, kind, *layout)
        for family in FAMILIES
        for layout in LAYOUTS
        for kind in ("plain", "documents", "dropout")
        if not (kind == "dropout" and layout[1])
    ]
    ranks = run_ranks(WORLD, _run_all, cases)
    return {case: [rank[at] for rank in ranks] for at, case in enumerate(cases)}


@pytest.mark.parametrize("kind", ["plain", "documents", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_equals_one_process(family: str, kind: str, parallel: dict[Any, list[Result]]) -> None:
    loss, gradients = _run(family, kind)
    expected = {name: torch.from_numpy(gradient) for name, gradient in gradients.items()}
    for tp, sequence_parallel in LAYOUTS:
        if kind == "dropout" and sequence_parallel:
            continue  # each rank then draws the masks of its own tokens
        ranks = parallel[family, kind, tp, sequence_parallel]
        assert [rank[0] for rank in ranks] == pytest.approx([loss] * WORLD, rel=TOLERANCE)
        copies = kv_copies(FAMILIES[family].num_kv_heads, tp)
        errors = gradient_errors(_joined([rank[1] for rank in ranks[:tp]], copies), expected)
        print(f"{family} {kind} TP{tp} SP={sequence_parallel}: {max(errors.values()):.1e}")
        assert max(errors.values()) < TOLERANCE, errors


def _fully_shard(model: GPT, groups: ProcessGroups) -> None:
    assert groups.mesh is not None
    to_dtensors(model, groups.mesh, groups.kv_mesh)
    for module in (*model.layers.values(), model):
        fully_shard(module, mesh=groups.data_parallel_mesh())


def _fully_sharded(families: list[str], recompute: RecomputePlan) -> list[Result]:
    """Mean loss and all gradients at DP2 x TP2, each data-parallel rank with a batch of its own."""
    results = []
    for family in families:
        arch = FAMILIES[family]
        groups = groups_for(arch, Topology(WORLD, tp=2))
        model = build(arch, groups, sequence_parallel=True, dtype=torch.float64, recompute=recompute).train()
        _fully_shard(model, groups)
        loss = loss_of(model, arch, groups, ModelInputs(), seed=groups.dp.rank)
        loss.backward()
        gradients = {name: p.grad.full_tensor().numpy() for name, p in model.named_parameters()}
        results.append((groups.sum_over_data(loss).item() / groups.dp.size, gradients))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute",
    [RecomputePlan(), RecomputePlan(granularity="selective"), RecomputePlan(granularity="full", num_layers=2)],
    ids=lambda plan: plan.granularity,
)
def test_fsdp_over_dtensors_equals_one_process(recompute: RecomputePlan) -> None:
    results = run_ranks(WORLD, _fully_sharded, list(FAMILIES), recompute)
    groups = single_process()
    for at, (family, arch) in enumerate(FAMILIES.items()):
        model = build(arch, dtype=torch.float64).train()
        loss = sum(loss_of(model, arch, groups, ModelInputs(), seed=seed) for seed in range(2)) / 2
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        for rank in results:
            mean_loss, gradients = rank[at]
            assert mean_loss == pytest.approx(loss.item(), rel=TOLERANCE)
            errors = gradient_errors({name: torch.from_numpy(g) for name, g in gradients.items()}, expected)
            assert max(errors.values()) < TOLERANCE, (family, errors)


def _sharded_before_initialisation() -> dict[str, np.ndarray]:
    arch = FAMILIES["qwen"]
    groups = groups_for(arch, Topology(WORLD, tp=2))
    model = GPT(arch, ops=reference_ops(), groups=groups, device=torch.device("meta"))
    _fully_shard(model, groups)
    model.to_empty(device="cpu")
    initialise_parameters(model, arch, groups, SEED)
    return {name: p.full_tensor().detach().numpy() for name, p in model.named_parameters()}


def test_weights_of_a_model_sharded_on_the_meta_device_are_the_same() -> None:
    """A model too large for one device is sharded before it has weights."""
    arch = FAMILIES["qwen"]
    weights = run_ranks(WORLD, _sharded_before_initialisation)[0]
    expected = GPT(arch, ops=reference_ops(), groups=single_process())
    initialise_parameters(expected, arch, single_process(), SEED)
    for name, parameter in expected.named_parameters():
        assert torch.equal(torch.from_numpy(weights[name]), parameter), name


@pytest.mark.slow
def test_parameters_that_do_not_divide_are_refused() -> None:
    run_ranks(WORLD, _refused)


def _refused() -> None:
    groups = build_groups(Topology(WORLD, tp=4), "cpu")
    with pytest.raises(ValueError, match="--tensor-model-parallel-size is 4, but the model has 90 feed-forward"):
        GPT(replace(FAMILIES["gpt"], ffn_hidden_size=90), ops=reference_ops(), groups=groups)
    with pytest.raises(ValueError, match=r"6 key-value heads \(--num-key-value-heads\) and 4 ranks"):
        GPT(replace(FAMILIES["gpt"], num_heads=12, num_kv_heads=6), ops=reference_ops(), groups=groups)
    with pytest.raises(ValueError, match="2 kv heads on 4 ranks need 2 copies, the groups have 1"):
        GPT(FAMILIES["llama"], ops=reference_ops(), groups=groups)


def test_relative_error_sees_a_difference() -> None:
    assert relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)
