"""What one of four ranks, TP2 x DP2, gives XLA to run: collectives in order, and compilations; prints JSON.

The other ranks are not there. Those that torch.distributed knows are of its "fake" group; a collective of torch_xla on
its CPU, which has one device, is compiled and changes nothing. So the numbers of these steps mean nothing, their graphs
are those of a real run. Called by `test_xla_compilation.py` with a rank and flags, by a Python that has torch_xla.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.debug.metrics as metrics
import torch_xla.runtime
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron import accelerators
from megatron.config.run import RunConfig, parse
from megatron.data.batch import Batch
from megatron.mpu.groups import build_groups
from megatron.mpu.topology import Topology
from megatron.ops import build_table
from megatron.training.build import build_engine
from megatron.training.engine import StepSettings
from megatron.training.report import Printers
from megatron.training.setup import Session
from megatron.training.vocabulary import build_vocabulary
from tests.parity import MODEL, TRAINING

WORLD, STEPS, MICRO_BATCHES = 4, 4, 2
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(rf" ({KINDS})\(.*replica_groups=([{{}}\d,]+),")


def _session(config: RunConfig, rank: int) -> Session:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    accelerator = accelerators.load("neuron_xla")
    ops, lines = build_table(accelerator, {})
    topology = Topology(WORLD, tp=config.parallel.tensor_model_parallel_size)
    groups = build_groups(topology, "xla", communicator=accelerator.capabilities.communicator)
    parts = {"ops": ops, "op_lines": tuple(lines), "printers": Printers.of(rank, WORLD)}
    return Session(accelerator=accelerator, device=torch_xla.device(), groups=groups, **parts)


def train(rank: int, flags: Sequence[str]) -> list[int]:
    """Take some steps; returns the number of compilations until the end of each.

    With sequence parallelism the first graph is the last one: gathers among four cannot run on one device.
    """
    env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    layout = ("--tensor-model-parallel-size", "2", *flags)
    config = parse([*MODEL, *TRAINING, *layout, "--mock-data", "--train-iters", str(STEPS)], env)
    session = _session(config, rank)
    engine = build_engine(config, session, build_vocabulary(config, lambda line: None)[1])
    text = torch.randint(100, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(2, 32))
    compiled = []
    for step in range(STEPS):
        try:
            engine.train_step([batch] * MICRO_BATCHES, StepSettings(lr=1e-3 / (step + 1), weight_decay=0.1))
        except RuntimeError as error:
            if "replica_id < replica_count" in str(error):
                break
            raise
        session.accelerator.synchronize()
        compiled.append(int(metrics.metric_data("CompileTime")[0]))
    return compiled


def collectives(text: str) -> list[list[list[str]]]:
    """Kind and groups of every collective, in order, of every graph in a dump of torch_xla."""
    return [COLLECTIVE.findall(graph) for graph in re.split(r"^HloModule", text, flags=re.MULTILINE)[1:]]


def main() -> None:
    """Dump all graphs that are run, and read them."""
    rank, *flags = sys.argv[1:]
    torch_xla.runtime.world_size = lambda: WORLD
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "graphs"
        os.environ |= {"XLA_SAVE_TENSORS_FILE": str(dump), "XLA_SAVE_TENSORS_FMT": "hlo"}
        compiled = train(int(rank), flags)
        graphs = collectives(dump.with_name("graphs.0").read_text())
    json.dump({"compiled": compiled, "graphs": graphs}, sys.stdout)


if __name__ == "__main__":
    main()
