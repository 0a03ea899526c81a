"""Attention of sequences that ranks share, against the definition on the whole sequence: results and all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron import accelerators
from megatron.mpu.collectives import own_part
from megatron.mpu.groups import ProcessGroups, build_groups
from megatron.mpu.ring_attention import ring_attention
from megatron.mpu.topology import Topology
from megatron.mpu.ulysses import copies_of_kv_heads, gather_heads, scatter_heads
from megatron.ops import Ops, build_table, reference, reference_ops
from tests.model.helpers import relative_error
from tests.support import run_ranks

WORLD, LENGTH, BATCH, CHANNELS = 4, 48, 2, 8
TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 3e-2}
"""Relative to the largest value: sums in another order; in bfloat16, parts of results are rounded one by one."""

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 20 + [2] * 23, [3] * 47 + [4]])


@dataclass(frozen=True)
class Case:
    """Ranks that share sequences, heads, and rules of attention."""

    ring: int
    ulysses: int
    heads: int = 4
    kv_heads: int = 4
    documents: bool = False
    alibi: bool = False
    window: int | None = None
    portable: bool = False
    dtype: torch.dtype = torch.float64


CASES = (
    Case(2, 1),
    Case(2, 1, kv_heads=1, documents=True),
    Case(2, 1, alibi=True),
    Case(2, 1, window=7, kv_heads=2),
    Case(4, 1, kv_heads=2),
    Case(4, 1, documents=True),
    Case(4, 1, kv_heads=2, documents=True, alibi=True, window=15),
    Case(4, 1, window=3),
    Case(4, 1, portable=True, kv_heads=2, documents=True, alibi=True, window=20),
    Case(4, 1, portable=True, kv_heads=1),
    Case(2, 1, portable=True, kv_heads=2, dtype=torch.bfloat16),
    Case(1, 2, kv_heads=2),
    Case(1, 2, kv_heads=1, documents=True, window=9),
    Case(1, 4, alibi=True),
    Case(1, 4, heads=8, kv_heads=2, documents=True),
    Case(1, 4, heads=12, kv_heads=6),
    Case(2, 2, heads=8, kv_heads=2, documents=True, alibi=True),
    Case(2, 2, heads=8, kv_heads=1, window=11, portable=True),
)


def _draw(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """Queries, keys, values and the gradient of the result, of whole sequences; and the rules."""
    generator = torch.Generator().manual_seed(3)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    tensors = [torch.randn(LENGTH, BATCH, n, CHANNELS, generator=generator).to(case.dtype) for n in heads]
    slopes = 2.0 ** -torch.arange(1.0, case.heads + 1.0) if case.alibi else None
    documents = DOCUMENTS if case.documents else None
    return tensors, {"scale": 0.4, "alibi_slopes": slopes, "document_ids": documents, "window": case.window}


def _attend(tensors: list[Tensor], rules: dict[str, Any], groups: ProcessGroups, ops: Ops) -> Tensor:
    q, k, v = scatter_heads(*tensors, groups.ulysses)
    slopes = rules["alibi_slopes"]
    rules = rules | {"alibi_slopes": None if slopes is None else own_part(slopes, groups.ulysses)}
    if groups.ring.size > 1:
        mixed = ring_attention(q, k, v, group=groups.ring, ops=ops, **rules)
    else:
        mixed = ops.attention(q, k, v, **rules)
    return gather_heads(mixed, groups.ulysses)


def _error(case: Case, groups: ProcessGroups) -> float:
    """Largest error of the result and of the gradients at this rank's tokens."""
    ops = build_table(accelerators.load("cpu"), {})[0] if case.portable else reference_ops()
    (*whole, grad), rules = _draw(case)
    oracle = [x.to(torch.float64, copy=True).requires_grad_() for x in whole]
    expected = reference.attention(*oracle, **rules)
    expected.backward(grad.double())
    own = torch.tensor(groups.sequence_part.tokens(LENGTH))
    parts = [x[own].clone().requires_grad_() for x in whole]
    found = _attend(parts, rules, groups, ops)
    found.backward(grad[own])
    assert found.dtype == case.dtype
    pairs = [(found.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(parts, oracle, strict=True))]
    return max(relative_error(mine.double(), theirs[own]) for mine, theirs in pairs)


def _errors() -> list[float]:
    groups = {
        (ring, ulysses): build_groups(Topology(WORLD, cp=ring * ulysses, ulysses=ulysses), "cpu")
        for ring, ulysses in sorted({(case.ring, case.ulysses) for case in CASES})
    }
    return [_error(case, groups[case.ring, case.ulysses]) for case in CASES]


@pytest.fixture(scope="module")
def errors() -> dict[Case, float]:
    """The largest error of any rank."""
    ranks = run_ranks(WORLD, _errors)
    return {case: max(found[at] for found in ranks) for at, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_sequences_give_the_results_and_gradients_of_whole_ones(case: Case, errors: dict[Case, float]) -> None:
    print(f"{case}: {errors[case]:.1e}")
    assert errors[case] < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("heads", "ranks", "copies"), [(8, 4, 1), (4, 4, 1), (2, 4, 2), (1, 4, 4), (6, 4, 2), (3, 2, 2)]
)
def test_copies_of_kv_heads_are_the_fewest(heads: int, ranks: int, copies: int) -> None:
    assert copies_of_kv_heads(heads, ranks) == copies


def _groups() -> dict[str, tuple[int, ...]]:
    groups = build_groups(Topology(8, cp=4, ulysses=2), "cpu")
    return {name: getattr(groups, name).ranks for name in ("tp", "cp", "dp", "ring", "ulysses", "dp_cp")}


def test_groups_of_a_ring_of_pairs() -> None:
    assert run_ranks(8, _groups)[5] == {
        "tp": (5,),
        "cp": (4, 5, 6, 7),
        "dp": (1, 5),
        "ring": (5, 7),
        "ulysses": (4, 5),
        "dp_cp": (0, 1, 2, 3, 4, 5, 6, 7),
    }
