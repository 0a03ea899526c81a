"""Copies of key-value heads leave no trace: checkpoints and exports hold each head once, and any layout goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron import checkpoint
from megatron.checkpoint.tensors import stream_tensors
from megatron.training.pretrained import export
from tests.parity import FLOAT32_TOLERANCE, TWO_HEADS, Layout, curve, difference, one_process

ONE = Layout("1 process", 1, model=TWO_HEADS)
FOUR = Layout("TP4", 4, ("--tensor-model-parallel-size", "4"), model=TWO_HEADS)
STEPS = (2, 4, 6)


def _silent(_: str) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("engine", [(), ("--deepspeed", "--zero-stage", "2")], ids=["native", "DeepSpeed"])
def test_training_goes_on_without_and_with_copies(engine: tuple[str, ...], tmp_path: Path) -> None:
    """TP4 (two ranks per head) -> one process -> TP4, and the weights in between."""
    whole, start = one_process(TWO_HEADS, STEPS[-1]), 0
    for number, (layout, stop) in enumerate(zip((FOUR, ONE, FOUR), STEPS, strict=True)):
        saving = ("--save", str(tmp_path / f"{number}"), "--save-interval", "2")
        loading = ("--load", str(tmp_path / f"{number - 1}"), "--exit-on-missing-checkpoint") if number else ()
        found = curve(layout, (*saving, *loading, *(engine if layout is FOUR else ())), stop)
        assert difference(found.losses, whole.losses[start:stop]) <= FLOAT32_TOLERANCE
        assert difference(found.norms, whole.norms[start:stop]) <= FLOAT32_TOLERANCE
        start = stop
    _holds_each_head_once(tmp_path)


def _holds_each_head_once(folder: Path) -> None:
    record = checkpoint.read_record(folder / "0")
    assert record is not None
    saved = dict(stream_tensors(record.path))
    for entry in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        assert saved[f"{entry}.layers.0.attention.key.weight"].shape == (2 * 8, 64)
        assert saved[f"{entry}.layers.1.attention.value.bias"].shape == (2 * 8,)
    export(str(folder / "0"), STEPS[0], str(folder / "hf"), torch.float32, _silent)
    exported = load_file(folder / "hf" / "model.safetensors")
    for theirs, ours in (("k_proj", "key"), ("v_proj", "value")):
        name = f"model.layers.1.self_attn.{theirs}.weight"
        assert torch.equal(exported[name], saved[f"model.layers.1.attention.{ours}.weight"])
