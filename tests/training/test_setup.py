"""What Megatron's flags for kernels mean on each device."""

from __future__ import annotations

import pytest

from megatron import accelerators
from megatron.config.run import parse
from megatron.ops import UnavailableOpError
from megatron.training.setup import SetupError, asked_implementations, engine_lines
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


def test_kernels_for_whole_attention_are_refused_where_it_is_computed_in_pieces():
    message = "--op attention=fused_sdpa: --context-parallel-size 2 computes attention in pieces.*--op attention_block,"
    with pytest.raises(UnavailableOpError, match=message):
        _asked("hpu", "--op", "attention=fused_sdpa", "--context-parallel-size", "2", ranks=2)


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


def test_the_log_says_what_computes_in_place_of_a_transformer_engine():
    config = parse([*FLAGS, "--fp8-format", "hybrid", "--transformer-impl", "transformer_engine"], {})
    (line,) = engine_lines(config, {"make_linear": "scaled_mm"})
    assert line.startswith("--transformer-impl transformer_engine: 8-bit products by scaled_mm;")
    assert engine_lines(parse(FLAGS, {}), {}) == []


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


@pytest.mark.skipif(not accelerators.load("cuda").capabilities.float8, reason="needs a GPU with 8-bit products")
def test_on_gpus_a_transformer_engine_is_torchs_products():
    asked = _asked("cuda", "--fp8-format", "hybrid", "--transformer-impl", "transformer_engine")
    assert asked == {"make_linear": "scaled_mm"}


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(UnavailableOpError, match="--attention-backend fused asks for attention=fused_sdpa, another"):
        _asked("hpu", "--op", "attention=reference", "--use-fused-sdpa", "true")
