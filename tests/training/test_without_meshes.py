"""The native engine on a device whose groups are made one by one: no mesh, no DTensor, no FSDP2.

Such a device is that of PyTorch/XLA (tests/accelerators/test_xla_compilation.py). Here it is the CPU, and what it is
compared with is the CPU with meshes.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron.accelerators.base import Accelerator, Capabilities
from megatron.accelerators.cpu import Cpu
from megatron.checkpoint import Saver, SaveSettings
from megatron.config.run import parse
from megatron.data.batch import Batch
from megatron.mpu.groups import build_groups, check_sums_suffice, new_group
from megatron.mpu.topology import Topology
from megatron.ops import build_table
from megatron.training.build import build_engine
from megatron.training.engine import Engine, LoadSource, SaveTarget, StepSettings
from megatron.training.report import Printers
from megatron.training.setup import Session
from megatron.training.vocabulary import build_vocabulary
from tests.parity import FLOAT32_TOLERANCE, MODEL, TRAINING, difference
from tests.support import run_ranks

WORLD, STEPS = 4, 3
TP4 = ("--tensor-model-parallel-size", "4", "--num-key-value-heads", "2")
CASES = {
    "TP2 SP DP2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "TP2 DP2, bfloat16": ("--tensor-model-parallel-size", "2", "--bf16"),
    "TP4, 2 key-value heads": TP4,
}


class WithoutMeshes(Cpu):
    """The CPU, if torch's meshes made no groups for it."""

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities, communicator=new_group)


@dataclass(frozen=True)
class Run:
    """Losses and norms of some steps, and how it went on from a checkpoint of the other device."""

    losses: list[float]
    norms: list[float]
    weights: float
    resumed: list[float]


def _engine(accelerator: Accelerator, flags: tuple[str, ...]) -> tuple[Engine, Session]:
    config = parse([*MODEL, *TRAINING, *flags, "--mock-data", "--train-iters", "9"], os.environ)
    parallel = config.parallel
    ops, lines = build_table(accelerator, {})
    groups = build_groups(
        Topology(WORLD, tp=parallel.tensor_model_parallel_size),
        "cpu",
        dp_replicas=parallel.data_parallel_size,
        kv_copies=parallel.kv_replicator,
        communicator=accelerator.capabilities.communicator,
    )
    parts = {"ops": ops, "op_lines": tuple(lines), "printers": Printers.of(groups.world.rank, WORLD)}
    session = Session(accelerator=accelerator, device=torch.device("cpu"), groups=groups, **parts)
    return build_engine(config, session, build_vocabulary(config, lambda line: None)[1]), session


def _steps(engine: Engine, data_rank: int) -> tuple[list[float], list[float]]:
    generator = torch.Generator().manual_seed(data_rank)
    losses, norms = [], []
    for _ in range(STEPS):
        texts = [torch.randint(100, (2, 33), generator=generator) for _ in range(2)]
        batches = [Batch(tokens=t[:, :-1], labels=t[:, 1:], loss_mask=torch.ones(2, 32)) for t in texts]
        result = engine.train_step(batches, StepSettings(lr=1e-2, weight_decay=0.1))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms


def _run(folder: str) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {}
    for number, (name, flags) in enumerate(CASES.items()):
        engines = [_engine(accelerator, flags) for accelerator in (Cpu(), WithoutMeshes())]
        places = [f"{folder}/{number} {kind}" for kind in ("meshes", "none")]
        steps = [_steps(engine, session.groups.dp.rank) for engine, session in engines]
        weights = [engine.parameters_norm() for engine, _ in engines]
        for (engine, _), place in zip(engines, places, strict=True):
            saver = Saver(place, SaveSettings(), group=None, log=lambda line: None)
            engine.save(SaveTarget(saver=saver), 1, {}, {})
        for (engine, _), place in zip(engines, reversed(places), strict=True):
            assert engine.load(LoadSource(root=place), optimizer=True, log=lambda line: None)
        again = [_steps(engine, session.groups.dp.rank)[0] for engine, session in engines]
        runs[name] = [Run(*steps[at], weights[at], again[at]) for at in range(2)]
    return runs


@pytest.mark.slow
def test_training_and_checkpoints_are_those_of_a_device_with_meshes(tmp_path: Path):
    for runs in run_ranks(WORLD, _run, str(tmp_path)):
        for name, (with_meshes, without) in runs.items():
            for field in ("losses", "norms", "resumed"):
                found, expected = getattr(without, field), getattr(with_meshes, field)
                assert difference(found, expected) <= FLOAT32_TOLERANCE, (name, field, found, expected)
            assert difference([without.weights], [with_meshes.weights]) <= FLOAT32_TOLERANCE, name


def test_what_needs_more_than_sums_is_refused_by_every_flag_that_asks_for_it():
    with pytest.raises(ValueError, match=r"set --pipeline-model-parallel-size 1 \(not 2\), --zero-stage 0 \(not 1\)"):
        check_sums_suffice(Topology(8, tp=2, pp=2), zero_stage=1)
    check_sums_suffice(Topology(8, tp=2))
    check_sums_suffice(Topology(2, tp=2), zero_stage=1)  # nothing to share among one
