"""The batch size over a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.training.microbatches import BatchPlan, BatchSize, BatchSizeError, RampUp


def test_constant() -> None:
    plan = BatchPlan(global_batch_size=32, micro_batch_size=2, data_parallel_size=4)
    assert plan.at(0) == plan.at(10**9) == BatchSize(32, 4)
    assert plan.iterations(100) == 3
    assert plan.describe() == "setting number of micro-batches to constant 4"


def test_ramp_up_grows_in_equal_steps() -> None:
    """16 -> 64 by 16 is 3 increments over 300 samples: one every 100 samples."""
    plan = BatchPlan(global_batch_size=64, micro_batch_size=2, data_parallel_size=4, ramp_up=RampUp(16, 16, 300))
    got = {consumed: plan.at(consumed).samples for consumed in (0, 99, 100, 199, 200, 299, 300, 301, 10**6)}
    assert got == {0: 16, 99: 16, 100: 32, 199: 32, 200: 48, 299: 48, 300: 64, 301: 64, 10**6: 64}
    assert plan.at(0).microbatches == 2 and plan.at(301).microbatches == 8
    assert plan.sizes() == [16, 32, 48, 64]


def test_a_ramp_up_step_need_not_be_a_whole_number_of_samples() -> None:
    """3 increments over 100 samples: every 33.33."""
    plan = BatchPlan(global_batch_size=4, micro_batch_size=1, data_parallel_size=1, ramp_up=RampUp(1, 1, 100))
    assert [plan.at(n).samples for n in (33, 34, 66, 67, 99, 100)] == [1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("ramp", [RampUp(64, 16, 300), RampUp(16, 16, 0)])
def test_a_ramp_up_without_a_step_is_constant(ramp: RampUp) -> None:
    plan = BatchPlan(global_batch_size=64, micro_batch_size=2, data_parallel_size=4, ramp_up=ramp)
    assert plan.at(0).samples == 64
    assert plan.sizes() == [64]


@given(start=st.integers(1, 5), steps=st.integers(0, 5), ramp=st.integers(0, 60), samples=st.integers(0, 300))
def test_iterations_are_those_that_fit(start: int, steps: int, ramp: int, samples: int) -> None:
    plan = BatchPlan(
        global_batch_size=start + 2 * steps, micro_batch_size=1, data_parallel_size=1, ramp_up=RampUp(start, 2, ramp)
    )
    consumed = count = 0
    while consumed + plan.at(consumed).samples <= samples:
        consumed += plan.at(consumed).samples
        count += 1
    assert plan.iterations(samples) == count


def test_parse() -> None:
    assert RampUp.parse(["16", "8", "1000"]) == RampUp(16, 8, 1000)


@pytest.mark.parametrize("values", [["16", "8"], ["16", "8", "many"], ["16", "8", "1", "1"], []])
def test_parse_refuses_other_formats(values: list[str]) -> None:
    with pytest.raises(BatchSizeError, match="expected the following format: --rampup-batch-size"):
        RampUp.parse(values)


def test_parse_refuses_values_without_sense() -> None:
    with pytest.raises(BatchSizeError, match="must be more than 0"):
        RampUp.parse([16, 0, 1000])


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(BatchSizeError, match=r"global batch size \(30\) is not divisible by micro batch size \(4\)"):
        BatchPlan(global_batch_size=30, micro_batch_size=4, data_parallel_size=2)
    with pytest.raises(BatchSizeError, match=r"interval \(48\) to be divisible by .* increment \(10\)"):
        BatchPlan(global_batch_size=64, micro_batch_size=1, data_parallel_size=1, ramp_up=RampUp(16, 10, 5))
    with pytest.raises(BatchSizeError, match=r"start batch size \(80\)"):
        BatchPlan(global_batch_size=64, micro_batch_size=1, data_parallel_size=1, ramp_up=RampUp(80, 10, 5))
    with pytest.raises(BatchSizeError, match="data_parallel_size is 0"):
        BatchPlan(global_batch_size=64, micro_batch_size=1, data_parallel_size=0)


def test_every_size_of_the_ramp_up_is_checked_at_the_start() -> None:
    with pytest.raises(BatchSizeError, match=r"global batch size \(20\).*--rampup-batch-size"):
        BatchPlan(global_batch_size=32, micro_batch_size=8, data_parallel_size=1, ramp_up=RampUp(8, 12, 100))
