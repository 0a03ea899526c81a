"""The list of what the model keeps for its backward pass, against what it really keeps."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron.accelerators import load
from megatron.accelerators.base import FLOAT8
from megatron.model.eight_bit import use_eight_bit
from megatron.model.gpt import GPT, ModelInputs
from megatron.model.inputs import Auxiliary
from megatron.model.recompute import RecomputePlan
from megatron.model.routing import RoutingPlan
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.eight_bit import EightBitScaling, ScalingRecipe
from megatron.mpu.expert_parallel import with_experts as with_expert_groups
from megatron.mpu.groups import build_groups
from megatron.ops import build_table, float8
from megatron.planner import activations
from megatron.training.loss import losses_of_model
from tests.planner.cases import GPT2, case, with_experts
from tests.planner.measure import fake_world, mark, measured

SMALL_THINGS = 0.01
"""Relative: LayerNorm's row statistics are 16-bit on CPUs; scalars and small constants are not listed."""

_OPERATIONS = {"fused": "sdpa", "masked": "sdpa", "blocked": "blocked", "reference": "reference"}


def _kept(plan) -> int:
    """Bytes that forward pass and loss leave behind."""
    asked = {"attention": _OPERATIONS[plan.kernels.attention]}
    if not plan.kernels.whole_logits:
        asked["linear_cross_entropy"] = "chunked"
    ops, _ = build_table(load("cpu"), asked)
    with fake_world(plan.topology.world_size):
        groups = with_expert_groups(build_groups(plan.topology, "cpu", kv_copies=plan.kv_copies), "cpu")
        model = GPT(
            plan.arch,
            ops=ops,
            groups=groups,
            sequence_parallel=plan.sequence_parallel,
            recompute=plan.recompute.of_stage(0),
            routing=plan.routing,
            dtype={2: torch.bfloat16, 4: torch.float32}[plan.itemsize],
        )
        if plan.fp8:
            formats = float8.formats("hybrid", FLOAT8, weight_gradient=plan.fp8_weight_gradients)
            use_eight_bit(model, EightBitScaling(ScalingRecipe(), formats, groups, torch.device("cpu")), ops)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        loss = losses_of_model
        if plan.kernels.whole_logits:
            loss = functools.partial(
                vocab_parallel_cross_entropy, vocab_size=plan.arch.vocab_size, group=groups.tp, ops=ops
            )
        tokens = torch.randint(0, plan.arch.vocab_size, (plan.micro_batch, plan.seq_length // plan.cp))
        inputs = ModelInputs(dropout_seed=1, auxiliary=Auxiliary(weight=1.0, totals=torch.zeros(4)), labels=tokens)
        with measured() as memory:
            losses = loss(model(tokens, inputs), tokens.transpose(0, 1))
            mark("after the forward pass")
        del losses
    return memory.held["after the forward pass"]


def _listed(plan) -> int:
    parts = (*activations.embedding(plan), *activations.head(plan))
    listed = activations.stage_bytes(plan, 0) + activations.total(parts)
    return listed + activations.rotary_bytes(plan)


EIGHT_BITS = {"fp8": True, "world": 2, "tp": 2}
PADDED = RoutingPlan(train_capacity_factor=1.25, pad=True)
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
    "losses without logits": {"whole_logits": False},
    "losses without logits, sequence parallel": {"whole_logits": False, "world": 4, "tp": 4, "sequence_parallel": True},
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
    "8 bits": {"fp8": True},
    "8 bits, sequence parallel": EIGHT_BITS | {"sequence_parallel": True},
    "8 bits, 16-bit weight gradients": EIGHT_BITS | {"sequence_parallel": True, "fp8_weight_gradients": False},
    "8 bits, selective": EIGHT_BITS | {"recompute": RecomputePlan(granularity="selective")},
    "8 bits, feed-forward": EIGHT_BITS | {"recompute": MLP, "attention": "blocked"},
    "8 bits, gpt2": EIGHT_BITS | {"arch": GPT2 | {"activation": "relu"}},
    "experts": {"arch": with_experts()},
    "experts, float32": {"arch": with_experts(shared_ffn_hidden_size=48), "itemsize": 4},
    "experts, one of each token": {"arch": with_experts(topk=1, pre_softmax=True)},
    "experts, gpt2": {"arch": with_experts(GPT2)},
    "experts, shared block": {"arch": with_experts(shared_ffn_hidden_size=48)},
    "experts, capacity": {"arch": with_experts(), "routing": PADDED},
    "experts, tensor parallel": {"arch": with_experts(), "world": 4, "tp": 4},
    "experts, sequence parallel": {
        "arch": with_experts(shared_ffn_hidden_size=48),
        "world": 4,
        "tp": 4,
        "sequence_parallel": True,
    },
    "experts, full": {"arch": with_experts(), "recompute": RecomputePlan(granularity="full", num_layers=2)},
    "experts, first layer": {
        "arch": with_experts(),
        "recompute": RecomputePlan(granularity="full", method="block", num_layers=1),
    },
    "experts, feed-forward": {"arch": with_experts(), "recompute": MLP},
    "expert parallel": {"arch": with_experts(), "world": 4, "ep": 4, "routing": PADDED},
    "one expert on each rank": {"arch": with_experts(), "world": 8, "ep": 8, "routing": PADDED},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_list_is_what_is_kept(name):
    plan = case(**CASES[name])
    assert _listed(plan) == pytest.approx(_kept(plan), rel=SMALL_THINGS)
