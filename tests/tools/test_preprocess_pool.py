"""The ordered map over processes, with work whose duration and failures are chosen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from megatron.data.preprocess.pool import WorkerError, ordered_map


def slow_square() -> Callable[[int], int]:
    """The first jobs take longest, so results come back out of order."""

    def work(job: int) -> int:
        time.sleep(0.05 if job % 3 == 0 else 0)
        return job * job

    return work


def fail_at_five() -> Callable[[int], int]:
    def work(job: int) -> int:
        if job == 5:
            raise LookupError("five is missing")
        return job

    return work


def cannot_start() -> Callable[[int], int]:
    raise LookupError("no tokenizer here")


def exits() -> Callable[[int], int]:
    os._exit(3)


def echo() -> Callable[[bytes], bytes]:
    return bytes


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_keep_the_order_of_the_jobs(workers: int) -> None:
    assert list(ordered_map(slow_square, range(25), workers=workers)) == [job * job for job in range(25)]
    assert list(ordered_map(slow_square, [], workers=workers)) == []


def test_few_jobs_are_taken_ahead_of_the_results() -> None:
    taken = []
    jobs = (taken.append(job) or job for job in range(100))
    results = ordered_map(slow_square, jobs, workers=2)
    next(results)
    time.sleep(0.2)
    assert len(taken) <= 1 + 2 * 4
    results.close()


def test_messages_larger_than_a_pipe_do_not_block() -> None:
    jobs = [bytes([number]) * 3_000_000 for number in range(6)]
    assert list(ordered_map(echo, jobs, workers=2)) == jobs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fail_at_five, "five is missing"),
        (cannot_start, "no tokenizer here"),
        (exits, "ended by itself with exit code 3"),
    ],
)
def test_failures_of_a_worker_are_told(make: Callable[[], Callable[[int], int]], message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        list(ordered_map(make, range(20), workers=2))
