"""The sum at the end of row-parallel layers within Ascend's matrix product, on simulated NPUs."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron import accelerators
from megatron.mpu.groups import build_groups
from megatron.mpu.layers import RowParallelLinear
from megatron.mpu.topology import Topology
from megatron.ops import build_table
from megatron.training.metrics import read_metrics
from tests.parity import MODEL, TRAINING, difference, train
from tests.sim.run import Counts, counted, run_on_sim

pytestmark = pytest.mark.slow

STEPS = 2
SUMS = 2 * 2**-8
"""Relative to the largest element: a rounding to bfloat16 of each product and of their sum."""


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _layer() -> tuple[list[np.ndarray], Counts, list[str]]:
    """Output and gradients of a layer on this rank, what was counted meanwhile, and what wrong calls are told."""
    accelerator = accelerators.select("npu")
    ops, _ = build_table(accelerator, {"matmul_all_reduce": "fused"})
    device = torch.device("npu", torch.npu.current_device())
    group = build_groups(Topology(2, tp=2), "npu").tp
    layer = RowParallelLinear(32, 24, bias=False, ops=ops, group=group, dtype=torch.bfloat16, device=device)
    part = slice(16 * group.rank, 16 * group.rank + 16)
    layer.weight.data.copy_(_draw(24, 32, seed=1)[:, part])
    x = _draw(8, 2, 32, seed=2)[..., part].to(device).requires_grad_()
    gradient = _draw(8, 2, 24, seed=3).to(device)
    with counted("npu") as counts:
        output, _ = layer(x)
        output.backward(gradient)
        found = counts()
    numbers = [tensor.detach().float().cpu().numpy() for tensor in (output, x.grad, layer.weight.grad)]
    x, weight = x.detach(), layer.weight.detach()
    refusals = []
    for call in ((x.float(), weight.float(), group.handle), (x, weight, types.SimpleNamespace(size=lambda: 3))):
        with pytest.raises(ValueError) as refusal:
            ops.matmul_all_reduce(*call)
        refusals.append(str(refusal.value))
    dist.barrier()
    return numbers, found, refusals


def test_a_layer_is_that_of_one_process():
    x, weight = (_draw(*shape, seed=seed).float().requires_grad_() for shape, seed in (((8, 2, 32), 2), ((24, 32), 1)))
    expected = torch.nn.functional.linear(x, weight)
    expected.backward(_draw(8, 2, 24, seed=3).float())
    for rank, (numbers, counts, refusals) in enumerate(run_on_sim("npu", _layer, world_size=2)):
        part = slice(16 * rank, 16 * rank + 16)
        for mine, true in zip(numbers, (expected.detach(), x.grad[..., part], weight.grad[:, part]), strict=True):
            assert np.abs(mine - true.numpy()).max() <= SUMS * np.abs(true.numpy()).max()
        assert counts.vendor() == {"npu_mm_all_reduce_base": 1}
        assert counts.collectives == {}, "backward sends nothing"
        assert "not in torch.float32" in refusals[0] and "over (2, 4, 8) tensor-parallel ranks, not 3" in refusals[1]
        assert all(refusal.endswith(": use --op matmul_all_reduce=torch") for refusal in refusals)


def _train(folder: Path, *flags: str) -> tuple[list[float], Counts]:
    folder.mkdir()
    arguments = [
        *(*MODEL, *TRAINING, "--mock-data", "--train-iters", "20", "--exit-interval", str(STEPS), "--bf16"),
        *("--device", "npu", "--tensor-model-parallel-size", "2", "--log-json", str(folder / "metrics.jsonl"), *flags),
    ]
    counts, _ = run_on_sim("npu", _train_and_count, arguments, world_size=2, join=False)
    records = read_metrics(folder / "metrics.jsonl")
    return [record["lm_loss"] for record in records if record["kind"] == "train"], counts


def _train_and_count(arguments: list[str]) -> Counts:
    with counted("npu") as counts:
        train(arguments)
        return counts()


def test_training_has_the_losses_of_the_separate_steps(tmp_path):
    separate, before = _train(tmp_path / "separate")
    fused, after = _train(tmp_path / "fused", "--op", "matmul_all_reduce=fused")
    assert len(fused) == STEPS
    assert difference(fused, separate) <= SUMS
    calls = STEPS * 4 * 2 * 2  # micro-batches, layers, and attention and feed-forward in each
    assert after.vendor()["npu_mm_all_reduce_base"] == calls
    assert "npu_mm_all_reduce_base" not in before.vendor()
    assert before.collectives["allreduce"] - after.collectives["allreduce"] == calls
