"""The list of what the model keeps for its backward pass, against what it really keeps."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron.accelerators import load
from megatron.model.gpt import GPT, ModelInputs
from megatron.model.recompute import RecomputePlan
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.groups import build_groups
from megatron.ops import build_table
from megatron.planner import activations
from tests.planner.cases import GPT2, case
from tests.planner.measure import fake_world, mark, measured

SMALL_THINGS = 0.01
"""Relative: LayerNorm's row statistics are 16-bit on CPUs; scalars and small constants are not listed."""

_OPERATIONS = {"fused": "sdpa", "masked": "sdpa", "blocked": "blocked", "reference": "reference"}


def _kept(plan) -> int:
    """Bytes that forward pass and loss leave behind."""
    ops, _ = build_table(load("cpu"), {"attention": _OPERATIONS[plan.kernels.attention]})
    with fake_world(plan.topology.world_size):
        groups = build_groups(plan.topology, "cpu", kv_copies=plan.kv_copies)
        model = GPT(
            plan.arch,
            ops=ops,
            groups=groups,
            sequence_parallel=plan.sequence_parallel,
            recompute=plan.recompute.of_stage(0),
            dtype={2: torch.bfloat16, 4: torch.float32}[plan.itemsize],
        )
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        loss = functools.partial(
            vocab_parallel_cross_entropy, vocab_size=plan.arch.vocab_size, group=groups.tp, ops=ops
        )
        tokens = torch.randint(0, plan.arch.vocab_size, (plan.micro_batch, plan.seq_length // plan.cp))
        with measured() as memory:
            losses = loss(model(tokens, ModelInputs(dropout_seed=1)), tokens.transpose(0, 1))
            mark("after the forward pass")
        del losses
    return memory.held["after the forward pass"]


def _listed(plan) -> int:
    parts = (*activations.embedding(plan), *activations.head(plan))
    listed = activations.stage_bytes(plan, 0) + activations.total(parts)
    return listed + activations.rotary_bytes(plan)


FULL, MLP = RecomputePlan(granularity="full"), RecomputePlan(granularity="mlp")
CASES = {
    "llama": {},
    "float32": {"itemsize": 4},
    "tensor parallel": {"world": 4, "tp": 4},
    "sequence parallel": {"world": 4, "tp": 4, "sequence_parallel": True},
    "selective": {"recompute": RecomputePlan(granularity="selective")},
    "full": {"recompute": FULL},
    "full, groups of two": {"recompute": RecomputePlan(granularity="full", num_layers=2)},
    "full, first two layers": {"recompute": RecomputePlan(granularity="full", method="block", num_layers=2)},
    "full, sequence parallel": {"recompute": FULL, "world": 4, "tp": 4, "sequence_parallel": True},
    "full, one layer by a list": {"recompute": RecomputePlan(granularity="full", method="block", num_layers=(1,))},
    "feed-forward": {"recompute": MLP},
    "feed-forward, sequence parallel": {"recompute": MLP, "world": 4, "tp": 4, "sequence_parallel": True},
    "feed-forward, gpt2": {"arch": GPT2, "recompute": MLP},
    "blocked attention": {"attention": "blocked"},
    "blocked attention, selective": {"attention": "blocked", "recompute": RecomputePlan(granularity="selective")},
    "reference attention": {"attention": "reference"},
    "gpt2": {"arch": GPT2},
    "gpt2, sequence parallel": {"arch": GPT2, "world": 4, "tp": 4, "sequence_parallel": True},
    "gpt2, dropout": {"arch": GPT2 | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, "attention": "blocked"},
    "reference attention, dropout": {"arch": {"attention_dropout": 0.1}, "attention": "reference"},
    "bloom": {"arch": GPT2 | {"position": "alibi", "embedding_norm": True}, "attention": "blocked"},
    "window": {"arch": {"sliding_window": 32}, "attention": "blocked"},
    "window with a mask": {"arch": {"sliding_window": 32}, "attention": "masked"},
    "query and key norm": {"arch": {"qk_norm": True}},
    "float32 residual": {"arch": {"fp32_residual": True}},
    "squared relu": {"arch": {"activation": "squared_relu"}},
    "relu": {"arch": {"activation": "relu"}},
    "geglu": {"arch": {"activation": "geglu"}},
    "multi-head": {"arch": {"num_kv_heads": 8}},
    "copies of kv heads": {"arch": {"num_kv_heads": 2}, "world": 4, "tp": 4},
    "ring": {"world": 2, "cp": 2},
    "ring, selective": {"world": 2, "cp": 2, "recompute": RecomputePlan(granularity="selective")},
    "Ulysses": {"arch": {"num_kv_heads": 2}, "world": 4, "cp": 4, "ulysses": 4},
    "Ulysses, blocked attention": {"world": 2, "cp": 2, "ulysses": 2, "attention": "blocked"},
    "ring of Ulysses": {"world": 4, "cp": 4, "ulysses": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_list_is_what_is_kept(name):
    plan = case(**CASES[name])
    assert _listed(plan) == pytest.approx(_kept(plan), rel=SMALL_THINGS)
