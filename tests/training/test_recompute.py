"""Recomputation and activations on the host change no bit of training: dropout, 16 bits, pipelines, both engines."""

from __future__ import annotations

import os

import pytest
import torch

from megatron.config.run import RunConfig, parse
from megatron.data.batch import Batch
from megatron.training.build import build_engine
from megatron.training.engine import StepSettings
from megatron.training.setup import start
from megatron.training.vocabulary import build_vocabulary
from tests.parity import DEEP, TRAINING
from tests.support import run_ranks

RANKS = 4
STEPS = 2
_FULL = ("--recompute-granularity", "full")
MODES = {
    "selective": ("--recompute-granularity", "selective"),
    "mlp": ("--recompute-granularity", "mlp"),
    "full": _FULL,
    "by two": (*_FULL, "--recompute-num-layers", "2"),
    "block": (*_FULL, "--recompute-method", "block"),
    "list": ("--recomputation-layer-num", "2", "1"),
    "inputs on the host": (*_FULL, "--checkpoint-in-cpu"),
    "on the host": ("--cpu-offloading-num-layers", "1"),
}
TENSOR = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PIPELINE = (*TENSOR, "--pipeline-model-parallel-size", "2")
LAYOUTS = {
    "1f1b": (PIPELINE, tuple(MODES)),
    "zero-bubble": ((*PIPELINE, "--pipeline-schedule", "zero-bubble"), tuple(MODES)),
    "stage 3": ((*TENSOR, "--zero-stage", "3"), ("mlp", "inputs on the host", "on the host")),
    "DeepSpeed's pipeline": ((*PIPELINE, "--deepspeed", "--zero-stage", "1"), ("mlp", "list")),
    "DeepSpeed's stage 3": ((*TENSOR, "--deepspeed", "--zero-stage", "3"), ("mlp", "full", "on the host")),
}
Numbers = list[tuple[float, float]]


def _train(config: RunConfig) -> Numbers:
    """Loss and gradient norm of some steps; the second one shows every bit of the first one's update."""
    session = start(config)
    _, arch = build_vocabulary(config, lambda _: None)
    engine = build_engine(config, session, arch)
    results = []
    for step in range(STEPS):
        batches = [_batch(config, 10 * step + at, session.groups.dp.rank) for at in range(4)]
        results.append(engine.train_step(batches, StepSettings(lr=1e-2, weight_decay=0.1)))
    return [(result.loss, result.grad_norm) for result in results]


def _batch(config: RunConfig, number: int, rank: int) -> Batch:
    random = torch.Generator().manual_seed(100 * rank + number)
    shape = (config.training.micro_batch_size, config.data.seq_length)
    tokens, labels = torch.randint(0, 100, (2, *shape), generator=random)
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(shape),
        position_ids=None,
        document_ids=None,
        dropout_seed=number,
    )


def _all_modes(layout: str) -> dict[str, Numbers]:
    flags, modes = LAYOUTS[layout]
    dropout = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")
    argv = [*DEEP, *TRAINING, *dropout, "--bf16", "--mock-data", "--train-iters", "9", *flags]
    runs = {"none": (), **{name: MODES[name] for name in modes}}
    return {name: _train(parse([*argv, *mode], os.environ)) for name, mode in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bit_changes(layout: str) -> None:
    for found in run_ranks(RANKS, _all_modes, layout, init=False):
        kept = found.pop("none")
        assert len({loss for loss, _ in kept}) == STEPS
        for name, numbers in found.items():
            assert numbers == kept, name
