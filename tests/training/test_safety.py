"""When a run ends before its job does, and which flags go together."""

from __future__ import annotations

import time

import pytest

from megatron.config.run import parse
from megatron.training.safety import exit_rules, minutes_left
from megatron.training.setup import SetupError

_RUN = (
    *("--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1", "--seq-length", "8", "--lr", "1"),
    *("--max-position-embeddings", "8", "--micro-batch-size", "1", "--train-iters", "1"),
    *("--mock-data", "--vocab-size", "9"),
)
SECONDS_OF_SLACK = 60.0


def test_time_until_the_job_ends() -> None:
    env = {"SLURM_JOB_END_TIME": str(int(time.time()) + 3600)}
    assert minutes_left(None, env) is None
    assert minutes_left(10, env) == pytest.approx(50, abs=SECONDS_OF_SLACK / 60)
    for wrong in ({}, {"SLURM_JOB_END_TIME": "soon"}):
        with pytest.raises(SetupError, match=r"SLURM_JOB_END_TIME .* --exit-duration-in-mins"):
            minutes_left(10, wrong)


def test_the_earlier_end_counts_from_the_start_of_the_program() -> None:
    started, env = time.monotonic() - 600, {"SLURM_JOB_END_TIME": str(int(time.time()) + 3600)}

    def limit(*flags: str) -> float | None:
        return exit_rules(parse([*_RUN, *flags], {}), started, env).after_minutes

    assert limit() is None
    assert limit("--exit-duration-in-mins", "7") == 7
    assert limit("--exit-before-job-end-in-mins", "10") == pytest.approx(60, abs=SECONDS_OF_SLACK / 60)
    assert limit("--exit-before-job-end-in-mins", "10", "--exit-duration-in-mins", "7") == 7
