"""What Megatron's flags for kernels mean on each device."""

from __future__ import annotations

import pytest

from megatron import accelerators
from megatron.config.run import parse
from megatron.ops import UnavailableOpError
from megatron.training.setup import asked_implementations
from tests.parity import MODEL, TRAINING

FLAGS = (*MODEL, *TRAINING, "--mock-data", "--train-iters", "1")


def _asked(device: str, *flags: str) -> dict[str, str]:
    return asked_implementations(parse([*FLAGS, *flags], {}), accelerators.load(device))


@pytest.mark.parametrize(
    ("device", "flags", "op", "implementation"),
    [
        ("cpu", ("--use-flash-attn",), "attention", "blocked"),
        ("cuda", ("--use-flash-attn",), "attention", "flash_attn"),
        ("cuda", ("--use-fused-sdpa", "true"), "attention", "sdpa"),
        ("hpu", ("--use-fused-sdpa", "true"), "attention", "fused_sdpa"),
        ("hpu", ("--use-flash-attn",), "attention", "fused_sdpa"),
        ("hpu", ("--use-fused-rmsnorm", "true"), "rms_norm", "fused"),
        ("hpu", ("--optimizer", "fusedadamw"), "adamw", "fused"),
        ("npu", ("--use-flash-attn",), "attention", "fusion_attention"),
        ("npu", ("--use-fused-rmsnorm", "true"), "rms_norm", "fused"),
        ("neuron", ("--use-flash-attn",), "attention", "sdpa"),
        ("npu", ("--attention-backend", "unfused"), "attention", "reference"),
        ("npu", ("--no-masked-softmax-fusion",), "attention", "reference"),
        ("hpu", ("--use-fused-sdpa", "false"), "attention", "reference"),
        ("hpu", ("--op", "attention=fused_sdpa_recompute"), "attention", "fused_sdpa_recompute"),
    ],
)
def test_flags_for_kernels(device, flags, op, implementation):
    assert _asked(device, *flags)[op] == implementation


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(UnavailableOpError, match="--attention-backend fused asks for attention=fused_sdpa, another"):
        _asked("hpu", "--op", "attention=reference", "--use-fused-sdpa", "true")
