"""Estimated times, against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron.mpu.pipeline import StageLayout
from megatron.planner import compute
from megatron.planner.case import Case, case_of
from megatron.planner.communication import link, seconds
from megatron.planner.compute import Product, product_seconds
from megatron.planner.machines import LINK_EFFICIENCY, MACHINES
from megatron.planner.request import read_request, resolve
from megatron.planner.stages import idle_passes
from megatron.planner.step_time import speed, step_time
from megatron.training.flops import throughput, training_flops

EXACT = 1e-9
"""Relative: the same sums in another order."""


def _plan(flags: str, world: int, machine: str = "h100") -> Case:
    request = read_request(flags.split(), world)
    return case_of(resolve(request).settings, request.vocab_size, MACHINES[machine])


SEVEN = "--preset llama2-7b --bf16 --global-batch-size 64 "


def test_a_large_product_runs_near_the_best_rate():
    plan = _plan(SEVEN, 8)
    side = 8192
    h100 = plan.machine
    expected = 2 * side**3 / (h100.peak * h100.matmul) * (1 + h100.knee / side)
    assert product_seconds(plan, Product(side, side, side)) == pytest.approx(expected, rel=EXACT)


def test_no_product_is_quicker_than_its_memory_traffic():
    for machine in MACHINES:
        plan = _plan(SEVEN, 8, machine)
        for product in (Product(4096, 64, 4096), Product(64, 8192, 8192), Product(512, 512, 512)):
            elements = product.rows * (product.inputs + product.outputs) + product.inputs * product.outputs
            traffic = 2 * elements / plan.machine.bandwidth
            assert product_seconds(plan, product) > 0.9 * traffic


def test_products_are_the_operations_that_are_counted():
    plan = _plan(SEVEN + "--tensor-model-parallel-size 4", 8)
    qkv, inner = compute.column_products(plan)
    products = (*qkv, *inner, *compute.row_products(plan))
    per_layer = 3 * sum(2 * one.rows * one.inputs * one.outputs for one in products) * 4
    head = 3 * 2 * 4096 * 4096 * plan.arch.padded_vocab_size
    attention = 3 * 4 * (4096 * 4097 // 2) * 4096 * 32
    assert 32 * per_layer + head + attention == training_flops(plan.arch, 4096).model


@pytest.mark.parametrize("more", ["", "--moe-layer-freq 4 --moe-shared-expert-intermediate-size 2048"])
def test_products_of_experts_are_the_operations_that_are_counted(more):
    plan = _plan(f"--preset mixtral-8x7b --bf16 --seq-length 4096 --expert-model-parallel-size 4 {more}", 8)
    layers = [compute.layer_products(plan, experts=experts) for experts in plan.layers_with_experts(0)]
    products = sum(3 * 2 * one.rows * one.inputs * one.outputs for products in layers for one in products)
    head = 3 * 2 * 4096 * 4096 * plan.arch.padded_vocab_size
    attention = 3 * 4 * (4096 * 4097 // 2) * 4096 * 32
    assert products + head + attention == training_flops(plan.arch, 4096).model


def test_tokens_to_other_nodes_share_no_links():
    plan = _plan("--preset mixtral-8x7b --bf16 --tensor-model-parallel-size 4 --expert-model-parallel-size 8", 32)
    between, inside = plan.machine.between * LINK_EFFICIENCY, plan.machine.inside * LINK_EFFICIENCY
    _, latency = link(plan, "experts")
    away = 6 / 8  # two ranks of the group are in each node
    assert seconds(plan, "experts", "all-to-all", 8e9) == pytest.approx(latency + away * 8e9 / between, rel=EXACT)
    near = _plan("--preset mixtral-8x7b --bf16 --expert-model-parallel-size 8", 32)
    _, latency = link(near, "experts")
    assert seconds(near, "experts", "all-to-all", 8e9) == pytest.approx(latency + 7e9 / inside, rel=EXACT)


def test_experts_that_travel_further_take_longer():
    flags = "--preset mixtral-8x7b --bf16 --global-batch-size 64 --expert-model-parallel-size "
    alone, near, far = (step_time(_plan(flags + more, 32)) for more in ("1", "8", "8 --tensor-model-parallel-size 4"))
    assert alone.experts == 0.0 < near.experts < far.experts


def test_utilisation_is_that_of_the_training_log():
    plan = _plan(SEVEN + "--recompute-granularity full", 8)
    found = speed(plan)
    flops = training_flops(plan.arch, plan.seq_length, recompute="full")
    logged = throughput(flops, samples=64, seconds=found.step.total, devices=8, peak_flops=plan.machine.peak)
    assert found.mfu == pytest.approx(logged.mfu, rel=EXACT)
    assert found.hfu == pytest.approx(logged.hfu, rel=EXACT)
    assert found.tokens_per_second == pytest.approx(64 * 4096 / found.step.total / 8, rel=EXACT)


def test_recomputation_costs_a_forward_pass_of_the_layers():
    plain, again = (step_time(_plan(SEVEN + more, 8)) for more in ("", "--recompute-granularity full"))
    forward = compute.layer_forward(_plan(SEVEN, 8)).times(32).total * 8
    assert again.recompute == pytest.approx(forward, rel=EXACT)
    assert again.total - plain.total == pytest.approx(forward, rel=EXACT)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (4, 8), (8, 64)])
def test_bubble_of_the_usual_schedules(ranks, microbatches):
    """Narayanan et al. 2021 (arXiv:2104.04473): (p - 1) passes, or that over the number of stages per rank."""
    one = StageLayout(ranks, (1,) * ranks)
    assert idle_passes("1f1b", one, microbatches) == pytest.approx(ranks - 1)
    assert idle_passes("gpipe", one, microbatches) == pytest.approx(ranks - 1)
    four = StageLayout(ranks, (1,) * ranks * 4)
    assert idle_passes("interleaved", four, microbatches) == pytest.approx((ranks - 1) / 4)
    assert idle_passes("zero-bubble", one, microbatches) < ranks - 1


def test_bubble_in_a_step():
    plan = _plan(SEVEN + "--pipeline-model-parallel-size 4", 4)
    found = speed(plan)
    # The last stage has the head, too: it is the slowest, and waits for shorter ones.
    assert 0.75 * 3 / (64 + 3) < found.bubble < 3 / (64 + 3)


def test_links_inside_a_node_and_between_nodes():
    inside = _plan(SEVEN + "--tensor-model-parallel-size 8 --sequence-parallel", 8)
    assert link(inside, "tensor")[0] == inside.machine.inside * LINK_EFFICIENCY
    spread = _plan(SEVEN + "--tensor-model-parallel-size 4 --zero-stage 1", 32)
    rails = 8 // 4  # the two ranks of the group that share a node have an adapter each
    assert link(spread, "data")[0] == rails * spread.machine.between * LINK_EFFICIENCY


def test_a_ring_sends_all_but_its_own_part():
    plan = _plan(SEVEN + "--tensor-model-parallel-size 8", 8)
    bandwidth, latency = link(plan, "tensor")
    once = seconds(plan, "tensor", "all-gather", 8e9)
    assert once == pytest.approx(latency + 7e9 / bandwidth, rel=EXACT)
    twice = seconds(plan, "tensor", "all-reduce", 8e9)
    assert twice == pytest.approx(latency + 14e9 / bandwidth, rel=EXACT)


@pytest.mark.parametrize(
    ("slower", "quicker"),
    [
        (SEVEN + "--recompute-granularity full", SEVEN),
        (SEVEN, SEVEN + "--use-torch-compile"),
        (SEVEN, SEVEN + "--fp8-format hybrid"),
        (SEVEN + "--attention-backend unfused", SEVEN),
        (SEVEN + "--tensor-model-parallel-size 8 --sequence-parallel", SEVEN),
        (SEVEN + "--deepspeed --zero-stage 1", SEVEN + "--zero-stage 1"),
        (
            SEVEN + "--pipeline-model-parallel-size 8",
            SEVEN + "--pipeline-model-parallel-size 8 --pipeline-schedule zbv",
        ),
        (SEVEN.replace("--bf16", ""), SEVEN),
    ],
)
def test_what_is_slower(slower, quicker):
    assert step_time(_plan(slower, 8)).total > step_time(_plan(quicker, 8)).total


def test_an_offloaded_optimizer_is_slow():
    plan = _plan(SEVEN + "--deepspeed --zero-stage 2", 8)
    host = dataclasses.replace(plan, offload=True)
    assert step_time(host).optimizer > 10 * step_time(plan).optimizer
