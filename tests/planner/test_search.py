"""Finding layouts that fit."""

from __future__ import annotations

import pytest

from megatron.planner.case import case_of
from megatron.planner.machines import MACHINES
from megatron.planner.plan import Plan, Refused, make_plan
from megatron.planner.request import read_request, resolve
from megatron.planner.search import nearest, search

H100 = MACHINES["h100"]
GAUDI2 = MACHINES["gaudi2"]


def _request(flags, world):
    return read_request(flags.split(), world)


@pytest.fixture(scope="module")
def found():
    return search(_request("--preset llama2-70b --bf16 --global-batch-size 256", 32), GAUDI2)


@pytest.mark.slow
def test_layouts_fit_and_the_quickest_comes_first(found):
    assert len(found) > 20
    assert all(one.needed <= GAUDI2.usable for one in found)
    speeds = [one.speed.tokens_per_second for one in found]
    assert speeds == sorted(speeds, reverse=True)
    assert len({(one.case.tp, one.case.pp, one.case.schedule) for one in found}) > 10


@pytest.mark.slow
def test_flags_of_a_layout_give_it_back(found):
    for one in found[:3] + found[-3:]:
        request = _request("--preset llama2-70b --bf16 --global-batch-size 256 " + " ".join(one.flags), 32)
        resolved = resolve(request)
        assert resolved.impossible == ()
        assert case_of(resolved.settings, request.vocab_size, GAUDI2) == one.case


def test_given_flags_stay():
    flags = "--preset llama2-7b --bf16 --tensor-model-parallel-size 2 --micro-batch-size 2 --zero-stage 1"
    found = search(_request(flags, 8), H100)
    assert found
    assert {(one.case.tp, one.case.micro_batch, one.case.zero_stage) for one in found} == {(2, 2, 1)}


def test_nothing_is_recomputed_without_need():
    found = search(_request("--preset llama2-7b --bf16 --micro-batch-size 1", 8), H100)
    assert {one.case.recompute.granularity for one in found[:3]} == {"none"}


def test_layers_that_do_not_divide_make_room_for_embedding_and_loss():
    flags = "--preset llama3.1-405b --bf16 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16"
    found = search(_request(flags + " --micro-batch-size 1", 1024), H100)
    assert (7, *[8] * 14, 7) in {one.case.stages.layers for one in found}


def test_nearest_to_a_layout_that_cannot_be():
    request = _request("--preset llama2-7b --bf16 --tensor-model-parallel-size 3", 8)
    assert isinstance(make_plan(request, H100), Refused)
    first = nearest(request, H100)[0]
    assert (first.case.tp, first.case.pp) in ((2, 1), (4, 1))


def test_nearest_to_a_layout_that_does_not_fit():
    request = _request("--preset llama2-70b --bf16 --tensor-model-parallel-size 8 --use-distributed-optimizer", 32)
    plan = make_plan(request, H100)
    assert isinstance(plan, Plan)
    assert not plan.fits
    offers = nearest(request, H100)
    assert len(offers) == 3
    assert offers[0].case.tp == 8
    assert all(one.needed <= H100.usable for one in offers)


def test_the_nearest_layout_may_have_another_micro_batch():
    request = _request("--preset llama2-7b --bf16 --micro-batch-size 64 --use-distributed-optimizer", 8)
    assert all(one.case.micro_batch < 64 for one in nearest(request, H100, 1))


def test_ranks_that_share_experts():
    request = _request("--preset mixtral-small --bf16 --pipeline-model-parallel-size 2 --micro-batch-size 1", 16)
    found = search(request, H100)
    assert {(one.case.tp, one.case.ep) for one in found} == {
        *((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)),
    }


@pytest.mark.slow
def test_sometimes_nothing_fits():
    request = _request("--preset llama3.1-405b --bf16", 8)
    assert search(request, H100) == []
    assert nearest(request, H100) == []


@pytest.mark.parametrize(
    ("flags", "world", "words"),
    [
        ("--preset llama2-7b --tensor-model-parallel-size 16", 8, "world size 8"),
        ("--preset llama2-7b --pipeline-model-parallel-size 64", 64, "--num-layers 32: must be a multiple"),
        ("--preset llama2-7b --context-parallel-size 2 --seq-length 4095", 8, "--seq-length 4095"),
        ("--preset llama2-7b --ds-sequence-parallel-size 64", 64, "--ds-sequence-parallel-size 64: must divide 32"),
    ],
)
def test_impossible_layouts_are_refused_with_the_reason(flags, world, words):
    found = make_plan(_request(flags, world), H100)
    assert isinstance(found, Refused)
    assert any(words in reason for reason in found.reasons)
