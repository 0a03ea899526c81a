"""The parameters of any rank."""

from __future__ import annotations

import time

import pytest

from megatron.mpu.expert_parallel import with_experts as with_expert_groups
from megatron.mpu.groups import build_groups
from megatron.mpu.topology import Topology
from megatron.planner.case import case_of
from megatron.planner.machines import MACHINES
from megatron.planner.parameters import build_rank, held_share, rank_groups, units_of
from megatron.planner.request import read_request, resolve
from tests.planner.cases import GPT2, case, with_experts
from tests.planner.measure import fake_world

SECONDS = 20.0
"""Far above what a model without numbers takes, far below what it took with them."""


def _plan(flags, world):
    request = read_request(flags.split(), world)
    return case_of(resolve(request).settings, request.vocab_size, MACHINES["h100"])


@pytest.mark.parametrize("rank", [0, 5, 11, 15])
def test_groups_are_those_of_a_real_world(rank):
    topology = Topology(16, tp=4, pp=2, cp=2)
    mine = rank_groups(topology, rank, kv_copies=2)
    with fake_world(16, rank):
        real = build_groups(topology, "cpu", kv_copies=2)
    for axis in ("tp", "cp", "dp", "pp", "dp_cp", "world", "kv_copies"):
        found, expected = getattr(mine, axis), getattr(real, axis)
        assert (found.ranks, found.rank, found.size) == (expected.ranks, expected.rank, expected.size)
    assert mine.place == real.place


@pytest.mark.parametrize("rank", [0, 5, 13])
def test_groups_of_experts_are_those_of_a_real_world(rank):
    topology = Topology(16, tp=2, cp=2, ep=4)
    mine = rank_groups(topology, rank).experts
    with fake_world(16, rank):
        real = with_expert_groups(build_groups(topology, "cpu"), "cpu").experts
    assert (mine.ep.ranks, mine.ep.rank, mine.edp_size) == (real.ep.ranks, real.ep.rank, real.edp_size)


MIXTRAL = {
    "mixtral-8x7b": (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --moe-expert-parallel-size 8",
        64,
    ),
    "mixtral-small": ("--expert-model-parallel-size 2", 8),
}


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("preset", MIXTRAL)
def test_any_rank_of_a_model_with_experts(preset, share):
    flags, world = MIXTRAL[preset]
    plan = _plan(f"--preset {preset} {flags}", world)
    rank = int(share * (world - 1))
    (model,) = build_rank(plan, rank)
    units = units_of(plan, plan.topology.place(rank).pp)
    assert sum(weight.numel() for weight in model.parameters()) == sum(unit.elements for unit in units)
    experts = sum(weight.numel() for layer in model.layers.values() for weight in layer.mlp.experts.parameters())
    assert experts == sum(unit.elements for unit in units if unit.experts)


def test_experts_of_all_ranks_are_the_published_model():
    flags, world = MIXTRAL["mixtral-8x7b"]
    plan = _plan(f"--preset mixtral-8x7b {flags}", world)
    units = [unit for rank in range(2) for unit in units_of(plan, rank)]
    experts = sum(unit.elements for unit in units if unit.experts) * 2 * 8
    rest = sum(unit.elements for unit in units if not unit.experts) * 2
    replicated = 65 * 4096 + 32 * 8 * 4096  # norms and routers
    padding = 2 * (plan.arch.padded_vocab_size - 32000) * 4096
    assert experts + rest - replicated - padding == 46702792704


def test_experts_are_cut_over_the_ranks_that_hold_the_same():
    plan = case(with_experts(), world=8, ep=4, zero_stage=1)
    (found,) = [unit for unit in units_of(plan, 0) if unit.name == "layers.0.experts"]
    assert found.elements == 2 * 3 * 64 * 96
    assert held_share(plan, [found]) == found.elements // 2


def test_rows_of_few_experts_are_cut():
    plan = case(with_experts(count=2), world=4, zero_stage=1)
    layer = units_of(plan, 0)[0]
    experts = [shape for shape in layer.shapes if len(shape) == 3]
    assert sorted(experts) == [(2, 64, 96), (2, 96, 64), (2, 96, 64)]
    router_padding = 64 // 2  # two rows on four ranks
    assert layer.shard(4) == layer.elements // 4 + router_padding


@pytest.mark.parametrize("rank", [0, 7, 16383])
def test_any_rank_of_a_large_world(rank):
    flags = "--preset llama3.1-405b --tensor-model-parallel-size 8 --pipeline-model-parallel-size 14"
    plan = _plan(flags + " --global-batch-size 146", 8 * 14 * 146)
    begin = time.monotonic()
    rank = min(rank, plan.topology.world_size - 1)
    (model,) = build_rank(plan, rank)
    assert time.monotonic() - begin < SECONDS
    place = plan.topology.place(rank)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    count = sum(weight.numel() for weight in model.parameters())
    assert count == sum(unit.elements for unit in units_of(plan, place.pp))


def test_units_of_all_ranks_are_the_published_model():
    plan = _plan("--preset llama2-70b --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4", 32)
    found = sum(unit.elements for rank in range(4) for unit in units_of(plan, rank)) * 8
    replicated = 7 * (2 * 80 + 1) * 8192  # norms
    padding = 2 * (32768 - 32000) * 8192
    assert found - replicated - padding == 68976648192


def test_kv_heads_fewer_than_ranks_are_replicated():
    plan = _plan("--preset llama3.1-70b --tensor-model-parallel-size 32", 32)
    (model,) = build_rank(plan, 31)
    attention = model.layers["0"].attention
    assert attention.key.weight.shape == attention.value.weight.shape == (128, 8192)
    assert attention.query.weight.shape == (256, 8192)


def test_a_shard_is_padded():
    unit = units_of(case({"num_layers": 1}), 0)[0]
    assert unit.shard(1) == unit.elements
    norm_rows = 2 * -(-64 // 7)
    assert unit.shard(7) == norm_rows + sum(-(-rows // 7) * columns for rows, columns in _matrices(unit))


def _matrices(unit):
    return [shape for shape in unit.shapes if len(shape) == 2]


def test_the_optimizer_keeps_nothing_for_a_copied_embedding():
    plan = case({**GPT2, "num_layers": 4}, world=2, pp=2)
    first, last = (units_of(plan, rank)[-1] for rank in range(2))
    assert first.optimized(1) == first.elements
    assert last.elements - last.optimized(1) == 512 * 64
