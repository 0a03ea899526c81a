"""The planned peak of memory against that of real training steps on one GPU."""

from __future__ import annotations

import pytest

from megatron.config.run import parse
from megatron.planner.case import case_of
from megatron.planner.machines import MACHINES
from megatron.planner.memory import worst_rank
from megatron.planner.request import read_request, resolve
from megatron.training.build import build_engine
from megatron.training.engine import StepSettings
from megatron.training.setup import start
from tests.planner.cases import batch
from tests.support import run_ranks

pytestmark = pytest.mark.gpu

TOO_LITTLE, TOO_MUCH = 0.05, 0.15
"""Relative: as on the CPU, and workspaces of the matrix products, which torch counts among the tensors."""

_RUN = (
    *("--preset", "llama3.2-1b", "--bf16", "--seq-length", "4096", "--micro-batch-size", "2", "--lr", "1e-4"),
    *("--global-batch-size", "4", "--train-iters", "2", "--mock-data", "--tokenizer-type", "NullTokenizer"),
)


def _peak(argv) -> int:
    """Bytes that torch's allocator handed out at most in the second step."""
    config = parse(argv, {"WORLD_SIZE": "1"})
    session = start(config)
    engine = build_engine(config, session, config.architecture(128256))
    for _ in range(2):
        session.accelerator.reset_peak_memory()
        engine.train_step([batch(config), batch(config)], StepSettings(lr=1e-4, weight_decay=0.0))
    return session.accelerator.memory_stats().max_allocated


@pytest.mark.parametrize("more", [(), ("--recompute-granularity", "full")], ids=["kept", "recomputed"])
def test_peak_of_a_step(more):
    argv = [*_RUN, *more]
    request = read_request(argv, 1)
    plan = case_of(resolve(request).settings, 128256, MACHINES["h200"])
    (found,) = run_ranks(1, _peak, argv, init=False)
    assert 1 - TOO_LITTLE < worst_rank(plan).peak.total / found < 1 + TOO_MUCH
