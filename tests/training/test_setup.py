"""What Megatron's flags for kernels mean on each device."""

from __future__ import annotations

import importlib.util

import pytest

from megatron import accelerators
from megatron.config.run import parse
from megatron.ops import UnavailableOpError
from megatron.training.setup import SetupError, asked_implementations, engine_lines
from tests.ops import engine_install
from tests.parity import MODEL, TRAINING

FLAGS = (*MODEL, *TRAINING, "--mock-data", "--train-iters", "1")


def _asked(device: str, *flags: str, ranks: int = 1) -> dict[str, str]:
    config = parse([*FLAGS, *flags], {"WORLD_SIZE": str(ranks)})
    return asked_implementations(config, accelerators.load(device))


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
        ("hpu", ("--use-fast-softmax", "--use-fused-sdpa", "true"), "attention", "fused_sdpa_fast"),
        (
            *("hpu", ("--use-fused-sdpa-with-recompute", "--use-fast-softmax"), "attention"),
            "fused_sdpa_fast_recompute",
        ),
    ],
)
def test_flags_for_kernels(device, flags, op, implementation):
    assert _asked(device, *flags)[op] == implementation


@pytest.mark.parametrize(
    ("device", "flags", "implementation"),
    [
        ("cuda", ("--use-flash-attn",), "flash"),
        ("cuda", ("--op", "attention_block=blocked", "--op", "attention_block_backward=blocked"), "blocked"),
        ("npu", ("--use-flash-attn",), "blocked"),
        ("hpu", ("--no-masked-softmax-fusion",), "reference"),
    ],
)
def test_flags_for_attention_in_pieces(device, flags, implementation):
    asked = _asked(device, *flags, "--context-parallel-size", "2", ranks=2)
    assert asked == {"attention_block": implementation, "attention_block_backward": implementation}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), "nothing to sum at --tensor-model-parallel-size 1; leave it out"),
        (("--tensor-model-parallel-size", "2", "--sequence-parallel"), "with --sequence-parallel .* reduce-scatter"),
        (("--tensor-model-parallel-size", "2", "--fp8-format", "e4m3"), "with --fp8-format e4m3 .* 8-bit numbers"),
    ],
)
def test_a_sum_within_the_product_is_refused_where_there_is_none(flags, reason):
    with pytest.raises(UnavailableOpError, match=f"--op matmul_all_reduce=fused: .*{reason}"):
        _asked("npu", "--op", "matmul_all_reduce=fused", *flags, ranks=2)


def test_a_sum_within_the_product_is_asked_for():
    flags = ("--op", "matmul_all_reduce=fused", "--tensor-model-parallel-size", "2")
    assert _asked("npu", *flags, ranks=2) == {"matmul_all_reduce": "fused"}


_ENGINE = ("--fp8-format", "hybrid", "--transformer-impl", "transformer_engine")


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="the package is installed")
def test_where_there_is_no_transformer_engine_another_kernel_computes_and_the_log_says_so():
    (line,) = engine_lines(parse([*FLAGS, *_ENGINE], {}), accelerators.load("cuda"))
    instead = "scaled_mm (transformer_engine unavailable: python package transformer-engine is not installed);"
    assert line.startswith(f"--transformer-impl transformer_engine: 8-bit products by {instead}")
    assert _asked("cuda", *_ENGINE) == {"make_linear": "scaled_mm"}
    assert engine_lines(parse(FLAGS, {}), accelerators.load("cuda")) == []


def test_where_there_is_a_transformer_engine_it_computes(monkeypatch, tmp_path):
    with engine_install.simulated(monkeypatch, tmp_path, "2.20.2", capability=(9, 0)):
        (line,) = engine_lines(parse([*FLAGS, *_ENGINE], {}), accelerators.load("cuda"))
        assert line.startswith("--transformer-impl transformer_engine: 8-bit products by transformer_engine;")
        assert _asked("cuda", *_ENGINE) == {"make_linear": "transformer_engine"}
        message = "asks for make_linear=transformer_engine, another flag for make_linear=scaled_mm; give one"
        with pytest.raises(UnavailableOpError, match=message):
            _asked("cuda", *_ENGINE, "--op", "make_linear=scaled_mm")


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cpu", "--transformer-impl transformer_engine: cpu has none; leave it out"),
        ("npu", "--fp8-format hybrid: npu does not compute with 8-bit numbers here; leave it out"),
    ],
)
def test_a_transformer_engine_is_refused_where_there_is_none(device, reason):
    with pytest.raises(SetupError, match=f"^{reason}$"):
        _asked(device, "--fp8-format", "hybrid", "--transformer-impl", "transformer_engine")


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(UnavailableOpError, match="--attention-backend fused asks for attention=fused_sdpa, another"):
        _asked("hpu", "--op", "attention=reference", "--use-fused-sdpa", "true")
