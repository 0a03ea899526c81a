"""Layouts drawn from a seed: whatever the rules accept trains with the numbers of one process."""

from __future__ import annotations

import os
import random

import pytest

from megatron.config.parser import ConfigError
from megatron.config.run import parse
from tests.parity import DEEP, DEEPSPEED, FLOAT32_TOLERANCE, NATIVE, TIED, TRAINING, Layout, curve, difference

STEPS = 4
DRAWS = 12
RANKS = (2, 4)
PARTS = (
    ("--tensor-model-parallel-size", (1, 1, 2, 4)),
    ("--context-parallel-size", (1, 1, 1, 2)),
    ("--ds-sequence-parallel-size", (1, 1, 1, 2)),
    ("--decoder-first-pipeline-num-layers", (None, None, None, 1)),
    ("--decoder-last-pipeline-num-layers", (None, None, None, 1)),
    ("--recompute-granularity", (None, None, "selective", "full")),
    ("--num-distributed-optimizer-instances", (None, None, None, 2)),
)
PIPELINES = (
    "",
    *("--pipeline-schedule gpipe", "--pipeline-schedule 1f1b", "--num-virtual-stages-per-pipeline-rank 2"),
    *("--pipeline-schedule zbv", "--pipeline-schedule zero-bubble"),
    "--pipeline-schedule zero-bubble --num-virtual-stages-per-pipeline-rank 2",
)
SWITCHES = ("--sequence-parallel", "--standalone-embedding-stage", "--account-for-loss-in-pipeline-split")
MODELS = (DEEP, TIED, (*DEEP, "--num-layers", "6"))


def _draw(random_: random.Random) -> tuple[Layout, tuple[str, ...]]:
    """A layout that the rules accept, and what one process has to do alike."""
    while True:
        ranks, model = random_.choice(RANKS), random_.choice(MODELS)
        pipeline = random_.choice(PIPELINES).split()
        pipeline += ["--pipeline-model-parallel-size", str(random_.choice((2, 2, 4)))] if pipeline else []
        words = [(flag, str(value)) for flag, values in PARTS if (value := random_.choice(values)) is not None]
        switches = [switch for switch in SWITCHES if random_.random() < 0.2]
        engine = random_.choice([*NATIVE.values(), DEEPSPEED["DeepSpeed ZeRO-1"], DEEPSPEED["DeepSpeed ZeRO-2"]])
        batch = ("--global-batch-size", str(random_.choice((8, 12, 16))))
        flags = (*pipeline, *(word for pair in words for word in pair), *switches, *engine)
        try:
            parse([*model, *TRAINING, "--mock-data", "--train-iters", "9", *batch, *flags], {"WORLD_SIZE": str(ranks)})
        except ConfigError:
            continue
        return Layout(" ".join(flags), ranks, flags, model=model), batch


@pytest.mark.slow
@pytest.mark.parametrize("number", range(DRAWS))
def test_a_layout_drawn_by_lot_equals_one_process(number: int) -> None:
    """Another seed can be tried with LAYOUT_SEED=2 in the environment."""
    seed = os.environ.get("LAYOUT_SEED", "1")
    layout, batch = _draw(random.Random(f"{seed} {number}"))
    print(f"{layout.ranks} ranks: {layout.name} {' '.join(batch)} {layout.model[-2:]}")
    found = curve(layout, batch, STEPS)
    expected = curve(Layout("1 process", 1, model=layout.model), batch, STEPS)
    assert difference(found.losses, expected.losses) <= FLOAT32_TOLERANCE
    assert difference(found.norms, expected.norms) <= FLOAT32_TOLERANCE
