"""Models whose ranks share sequences give the loss and every gradient of one process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.data.batch import Batch, own_tokens
from megatron.model.gpt import RecomputePlan
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.groups import ProcessGroups, build_groups, single_process, with_kv_copies
from megatron.mpu.sharding import is_replicated_kv, kv_copies, shard_dim
from megatron.mpu.topology import Topology
from megatron.ops import reference_ops
from megatron.training.step import model_inputs
from tests.model.helpers import FAMILIES, build, gradient_errors, tokens_of
from tests.support import run_ranks

WORLD = 4
TOLERANCE = 1e-10
"""Relative, float64: sums in another order."""
LAYOUTS = {
    "CP4": Topology(WORLD, cp=4),
    "Ulysses 4": Topology(WORLD, cp=4, ulysses=4),
    "CP2 x Ulysses 2": Topology(WORLD, cp=4, ulysses=2),
    "CP2 x TP2 SP": Topology(WORLD, tp=2, cp=2),
    "Ulysses 2 x TP2 SP": Topology(WORLD, tp=2, cp=2, ulysses=2),
}
FULL = RecomputePlan(granularity="full")
SELECTIVE = RecomputePlan(granularity="selective")
Case = tuple[str, str, bool, RecomputePlan]
CASES: list[Case] = [
    *((family, layout, False, RecomputePlan()) for family in FAMILIES for layout in LAYOUTS),
    *(("llama", layout, True, RecomputePlan()) for layout in LAYOUTS),
    *(("gpt", layout, True, RecomputePlan()) for layout in LAYOUTS),
    ("llama", "CP4", True, FULL),
    ("llama", "CP2 x Ulysses 2", True, SELECTIVE),
]
Result = tuple[float, dict[str, np.ndarray]]


def _batch(family: str, documents: bool) -> Batch:
    arch = FAMILIES[family]
    tokens, labels = tokens_of(arch)
    positions = torch.tensor([[*range(10), *range(6)]] * 3) if documents else None
    ids = torch.tensor([[0] * 10 + [1] * 6] * 3) if documents else None
    mask = torch.ones(tokens.shape)
    mask[:, 3] = 0.0
    return Batch(tokens=tokens, labels=labels, loss_mask=mask, position_ids=positions, document_ids=ids)


def _run(case: Case, groups: ProcessGroups) -> Result:
    """Sum of the losses of all tokens, and this tensor-parallel rank's gradients, summed over context parallelism."""
    family, _, documents, recompute = case
    arch = FAMILIES[family]
    batch = own_tokens(_batch(family, documents), groups.sequence_part)
    split = groups.tp.size > 1
    model = build(arch, groups, sequence_parallel=split, dtype=torch.float64, recompute=recompute).train()
    losses = vocab_parallel_cross_entropy(
        model(batch.tokens, model_inputs(batch)),
        batch.labels.t(),
        vocab_size=arch.vocab_size,
        group=groups.tp,
        ops=reference_ops(),
    )
    loss = (losses * batch.loss_mask.t()).sum()
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if groups.dp_cp.size > 1:
            dist.all_reduce(parameter.grad, group=groups.dp_cp.handle)
        gradients[name] = parameter.grad.numpy()
    return groups.sum_over_data(loss).item(), gradients


def _run_all() -> list[Result]:
    plain = {name: build_groups(topology, "cpu") for name, topology in LAYOUTS.items()}
    return [_run(case, with_kv_copies(plain[case[1]], _copies(case[0], case[1]))) for case in CASES]


def _copies(family: str, layout: str) -> int:
    return kv_copies(FAMILIES[family].num_kv_heads, LAYOUTS[layout].tp)


@pytest.fixture(scope="module")
def shared() -> dict[int, list[Result]]:
    """Results of the ranks 0 and 1 for every case: all there are of a tensor-parallel group."""
    ranks = run_ranks(WORLD, _run_all)
    return {at: [ranks[0][at], ranks[1][at]] for at in range(len(CASES))}


def _joined(parts: list[dict[str, np.ndarray]], tp: int, copies: int) -> dict[str, torch.Tensor]:
    """Logical gradients from those of the tensor-parallel ranks."""
    whole = {}
    for name, gradient in parts[0].items():
        dim, alike = shard_dim(name), copies if is_replicated_kv(name, copies) else 1
        joined = gradient if tp == 1 or dim is None else np.concatenate([part[name] for part in parts[::alike]], dim)
        whole[name] = torch.from_numpy(joined)
    return whole


@pytest.mark.parametrize("at", range(len(CASES)), ids=[f"{c[0]} {c[1]} {c[2]} {c[3].granularity}" for c in CASES])
def test_shared_sequences_equal_one_process(at: int, shared: dict[int, list[Result]]) -> None:
    family, layout, documents, _ = CASES[at]
    loss, gradients = _run((family, "", documents, RecomputePlan()), single_process())
    expected = {name: torch.from_numpy(gradient) for name, gradient in gradients.items()}
    found = _joined([result[1] for result in shared[at]], LAYOUTS[layout].tp, _copies(family, layout))
    assert shared[at][0][0] == pytest.approx(loss, rel=TOLERANCE)
    errors = gradient_errors(found, expected)
    print(f"{max(errors.values()):.1e}")
    assert max(errors.values()) < TOLERANCE, errors


def _dropped(recompute: RecomputePlan, groups: ProcessGroups) -> Result:
    """Loss and gradients of a model that drops attention weights and hidden states."""
    arch = replace(FAMILIES["llama"], attention_dropout=0.2, hidden_dropout=0.2)
    batch = own_tokens(_batch("llama", True), groups.sequence_part)
    model = build(arch, groups, dtype=torch.float64, recompute=recompute).train()
    loss = model(batch.tokens, replace(model_inputs(batch), dropout_seed=5)).square().mean()
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def _dropped_twice() -> list[Result]:
    groups = build_groups(LAYOUTS["Ulysses 4"], "cpu")
    return [_dropped(recompute, groups) for recompute in (RecomputePlan(), FULL, SELECTIVE)]


def test_recomputation_repeats_the_dropout_of_shared_heads() -> None:
    ranks = run_ranks(WORLD, _dropped_twice)
    for kept, *recomputed in ranks:
        for again in recomputed:
            assert again[0] == kept[0]
            for name, gradient in kept[1].items():
                np.testing.assert_array_equal(again[1][name], gradient, err_msg=name)
    assert ranks[0][0][0] != ranks[1][0][0]


def _refused(arch_changes: dict[str, float], topology: Topology) -> str:
    arch = replace(FAMILIES["llama"], **arch_changes)
    with pytest.raises(ValueError) as caught:
        build(arch, build_groups(topology, "cpu"))
    return str(caught.value)


def _refusals() -> list[str]:
    return [
        _refused({"attention_dropout": 0.1}, Topology(WORLD, cp=4)),
        _refused({"num_heads": 2, "num_kv_heads": 2}, Topology(WORLD, cp=4, ulysses=4)),
    ]


def test_what_cannot_be_is_refused() -> None:
    dropout, heads = run_ranks(WORLD, _refusals)[0]
    assert "--attention-dropout is 0.1; with --context-parallel-size above 1 it must be 0" in dropout
    assert "--ds-sequence-parallel-size is 4; it must divide the 2 attention heads" in heads
