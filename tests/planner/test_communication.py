"""The planned collectives against those that the model and the engine start."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch

from megatron.accelerators import load
from megatron.model.gpt import GPT, ModelInputs
from megatron.model.inputs import Auxiliary
from megatron.model.recompute import RecomputePlan
from megatron.model.routing import RoutingPlan
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.expert_parallel import with_experts as with_expert_groups
from megatron.mpu.groups import build_groups
from megatron.ops import build_table
from megatron.planner.communication import step_traffic
from megatron.training.build import build_engine
from megatron.training.engine import StepSettings
from megatron.training.setup import start
from tests.planner.cases import EXPERT_FLAGS, GPT2, batch, case, planned, with_experts
from tests.planner.measure import fake_world
from tests.planner.trace import Collectives

FULL = RecomputePlan(granularity="full")
MODELS = {
    "tensor parallel": {},
    "sequence parallel": {"sequence_parallel": True},
    "recomputed": {"recompute": FULL},
    "recomputed in one group": {"recompute": RecomputePlan(granularity="full", num_layers=3)},
    "first two recomputed": {"recompute": RecomputePlan(granularity="full", method="block", num_layers=2)},
    "recomputed, sequence parallel": {"recompute": FULL, "sequence_parallel": True},
    "feed-forward recomputed": {"recompute": RecomputePlan(granularity="mlp"), "sequence_parallel": True},
    "copies of kv heads": {"arch": {"num_kv_heads": 2, "qkv_bias": True}, "sequence_parallel": True},
    "gpt2, sequence parallel": {"arch": GPT2 | {"qk_norm": True, "embedding_norm": True}, "sequence_parallel": True},
    "experts": {"arch": with_experts()},
    "experts, sequence parallel": {"arch": with_experts(), "sequence_parallel": True},
    "experts and a shared block": {"arch": with_experts(shared_ffn_hidden_size=48), "sequence_parallel": True},
    "experts, gpt2": {"arch": with_experts(GPT2, shared_ffn_hidden_size=48), "sequence_parallel": True},
    "experts, recomputed": {
        "arch": with_experts(shared_ffn_hidden_size=48),
        "sequence_parallel": True,
        "recompute": RecomputePlan(granularity="full", num_layers=2),
    },
    "experts, feed-forward recomputed": {
        "arch": with_experts(shared_ffn_hidden_size=48),
        "sequence_parallel": True,
        "recompute": RecomputePlan(granularity="mlp"),
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_collectives_of_the_model(name):
    plan = case(world=4, tp=4, global_batch=2, **MODELS[name])
    assert _counted(plan, "tensor") + _counted(plan, "heads") == _collectives_of_the_model(plan)


def _collectives_of_the_model(plan) -> Counter:
    """Those of one micro-batch, forward and backward."""
    ops, _ = build_table(load("cpu"), {"attention": "sdpa"})
    with fake_world(4):
        groups = with_expert_groups(build_groups(plan.topology, "cpu", kv_copies=plan.kv_copies), "cpu")
        model = GPT(
            plan.arch,
            ops=ops,
            groups=groups,
            sequence_parallel=plan.sequence_parallel,
            recompute=plan.recompute,
            routing=plan.routing,
            dtype=torch.bfloat16,
        )
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        loss = functools.partial(
            vocab_parallel_cross_entropy, vocab_size=plan.arch.vocab_size, group=groups.tp, ops=ops
        )
        tokens = torch.randint(0, plan.arch.vocab_size, (plan.micro_batch, plan.seq_length // plan.cp))
        inputs = ModelInputs(dropout_seed=1, auxiliary=Auxiliary(weight=1.0, totals=torch.zeros(4)))
        with Collectives() as found:
            loss(model(tokens, inputs), tokens.transpose(0, 1)).sum().backward()
    return found.calls


SEQUENCES = {
    "ring": {"cp": 4},
    "ring, recomputed": {"cp": 4, "recompute": FULL},
    "ring, attention recomputed": {"cp": 4, "recompute": RecomputePlan(granularity="selective")},
    "Ulysses": {"cp": 4, "ulysses": 4},
    "Ulysses, copies of kv heads": {"cp": 4, "ulysses": 4, "arch": {"num_kv_heads": 2}},
    "Ulysses, recomputed": {"cp": 4, "ulysses": 4, "recompute": FULL},
    "Ulysses, attention recomputed": {"cp": 4, "ulysses": 4, "recompute": RecomputePlan(granularity="selective")},
    "ring of Ulysses": {"cp": 4, "ulysses": 2},
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_collectives_of_shared_sequences(name):
    plan = case(world=4, global_batch=2, **SEQUENCES[name])
    assert _counted(plan, "context") == _collectives_of_the_model(plan)


PADDED = RoutingPlan(train_capacity_factor=1.25, pad=True)
"""In a fake world nobody says how many tokens come, but with equally many for all experts nobody asks."""
EXPERTS = {
    "experts": {"ep": 4},
    "recomputed": {"ep": 4, "recompute": FULL},
    "feed-forward recomputed": {"ep": 4, "recompute": RecomputePlan(granularity="mlp")},
    "experts within sequences": {"ep": 2, "cp": 2},
    "sequences within experts": {"ep": 4, "cp": 4, "recompute": FULL},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_collectives_of_experts(name):
    changes = {"cp": 1} | EXPERTS[name]
    plan = case(with_experts(), world=4, routing=PADDED, global_batch=2 * 4 // changes["cp"], **changes)
    assert _counted(plan, "experts") + _counted(plan, "context") == _collectives_of_the_model(plan)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "shared"), [(0, 2), (1, 1), (1, 2), (2, 2), (3, 2)])
def test_bytes_of_the_native_engine_with_experts(stage, shared, capfd):
    _compare_bytes(stage, *EXPERT_FLAGS, "--expert-model-parallel-size", str(shared))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_of_the_native_engine(stage, capfd):
    _compare_bytes(stage)


def _compare_bytes(stage, *more):
    argv = ["--bf16", "--zero-stage", str(stage), "--global-batch-size", "8", *more]
    config, plan = planned(argv, 4)
    with fake_world(4):
        engine = build_engine(config, start(config), plan.arch)
        settings = StepSettings(lr=1e-3, weight_decay=0.0)
        engine.train_step([batch(config), batch(config)], settings)
        with Collectives() as found:
            engine.train_step([batch(config), batch(config)], settings)
    sizes: Counter[str] = Counter()
    for (operation, size, ranks), calls in found.calls.items():
        if ranks > 1:
            sizes[operation] += size * calls
    expected = Counter()
    for traffic in step_traffic(plan, 0):
        expected[traffic.operation] += int(traffic.payload * traffic.calls)
    scalars = 100  # token counts, losses and norms
    assert set(expected) <= set(sizes)
    for operation, size in sizes.items():
        assert size == pytest.approx(expected[operation], abs=scalars)


@pytest.mark.parametrize("flags", [(), ("--num-virtual-stages-per-pipeline-rank", "3"), ("--pipeline-schedule", "zbv")])
def test_bytes_between_pipeline_stages(flags, capfd):
    """Tied embeddings, so that the first and the last stage talk, too."""
    cut = ("--pipeline-model-parallel-size", "3", "--global-batch-size", "4")
    config, plan = planned(["--num-layers", "18", *cut, *flags, "--bf16"], 3, tied=True)
    rank = 2  # always the same: torch remembers meshes by their shape
    with fake_world(3, rank):
        engine = build_engine(config, start(config), plan.arch)
        settings = StepSettings(lr=1e-3, weight_decay=0.0)
        with Collectives() as found:
            engine.train_step([batch(config) for _ in range(4)], settings)
    expected: Counter[int] = Counter()
    for traffic in step_traffic(plan, rank):
        if traffic.axis == "pipeline":
            expected[traffic.payload] += int(traffic.calls)
    sent = Counter({size: calls for (operation, size, _), calls in found.calls.items() if operation == "send"})
    assert sent == expected


def _counted(plan, axis) -> Counter:
    calls: Counter = Counter()
    for traffic in step_traffic(plan, 0):
        if traffic.axis == axis:
            calls[traffic.operation, traffic.payload, traffic.ranks] += int(traffic.calls)
    return calls
