"""Published training speeds, and how far the estimates are from them.

The rows are other people's systems, so an estimate for this project's kernels cannot be right for all of them; how far
it is off says how much to trust it. Nothing in `megatron.planner.machines` was fit to these rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.planner.case import Case, case_of
from megatron.planner.machines import machine
from megatron.planner.memory import worst_rank
from megatron.planner.request import read_request, resolve
from megatron.planner.step_time import speed

_MPT = "--vocab-size 50368 --disable-bias-linear --activation gelu --attention-dropout 0 --hidden-dropout 0 --bf16"
_MPT_SIZES = {
    "MPT-1B": "--num-layers 24 --hidden-size 2048 --num-attention-heads 16",
    "MPT-3B": "--num-layers 32 --hidden-size 2560 --num-attention-heads 20",
    "MPT-7B": "--num-layers 32 --hidden-size 4096 --num-attention-heads 32",
    "MPT-13B": "--num-layers 40 --hidden-size 5120 --num-attention-heads 40",
    "MPT-30B": "--num-layers 48 --hidden-size 7168 --num-attention-heads 56",
    "MPT-70B": "--num-layers 80 --hidden-size 8192 --num-attention-heads 64",
}
_TINYLLAMA = (
    "--num-layers 22 --hidden-size 2048 --num-attention-heads 32 --num-key-value-heads 4 --ffn-hidden-size 5632 "
    "--swiglu --disable-bias-linear --normalization rmsnorm --position-embedding-type rope --vocab-size 32000 "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --bf16"
)
_FULL = "--recompute-granularity full"
_ZERO_2, _ZERO_3 = "--zero-stage 2", "--zero-stage 3"
_FOUNDRY = "llm-foundry, scripts/train/benchmarking"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published result.

    Attributes:
        system: who ran it.
        model: what was trained.
        machine: name of the machine.
        ranks: how many.
        flags: the same run in this project's flags.
        tokens_per_second: of one rank, as published or derived from what was.
        fp8: matrix products in FP8.
        remark: what is guessed, or differs from a run of this project.
    """

    system: str
    model: str
    machine: str
    ranks: int
    flags: str
    tokens_per_second: float
    fp8: bool = False
    remark: str = ""


def _foundry(
    size: str, name: str, ranks: int, seq: int, micro: int, batch: int, speed_: float, full: bool
) -> Published:
    more = _FULL if full else ""
    return Published(
        system=_FOUNDRY,
        model=f"{size}, {seq}" + (", full recomputation" if full else ""),
        machine=name,
        ranks=ranks,
        flags=f"{_MPT_SIZES[size]} {_MPT} --max-position-embeddings {seq} --seq-length {seq} {_ZERO_3} "
        f"--micro-batch-size {micro} --global-batch-size {batch} {more}",
        tokens_per_second=speed_,
    )


def _llama(preset: str, seq: int, micro: int, batch: int, more: str = "") -> str:
    return (
        f"--preset {preset} --bf16 --seq-length {seq} --micro-batch-size {micro} --global-batch-size {batch} "
        f"--use-flash-attn {more}"
    )


_COMPILED = "--use-torch-compile"
_TP = "--sequence-parallel --use-distributed-optimizer --tensor-model-parallel-size"
_PP = "--pipeline-model-parallel-size"
_COUNTED = (
    "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split "
    "--num-virtual-stages-per-pipeline-rank 8"
)
UNFUSED = "--attention-backend unfused"

PUBLISHED: tuple[Published, ...] = (
    Published(
        system="IBM fms-fsdp",
        model="LLaMA-2 7B, 4096",
        machine="h100",
        ranks=96,
        flags=_llama("llama2-7b", 4096, 2, 192, f"{_ZERO_3} --num-distributed-optimizer-instances 12 {_COMPILED}"),
        tokens_per_second=9600,
    ),
    Published(
        system="Fast-LLM, quick start",
        model="LLaMA-3.1 8B, 4096",
        machine="h100",
        ranks=32,
        flags=_llama("llama3.1-8b", 4096, 2, 512, f"{_ZERO_2} {_COMPILED}"),
        tokens_per_second=10100,
        remark="batch size guessed",
    ),
    Published(
        system="Fast-LLM, README",
        model="Mistral 7B, 8192",
        machine="h100",
        ranks=32,
        flags=_llama("mistral-7b", 8192, 1, 32, f"{_ZERO_2} {_COMPILED}"),
        tokens_per_second=9800,
    ),
    Published(
        system="torchtitan, 2024-12",
        model="LLaMA-3.1 8B, 8192",
        machine="h100",
        ranks=8,
        flags=_llama("llama3.1-8b", 8192, 2, 16, _ZERO_3),
        tokens_per_second=5762,
        remark="500 W cards; recomputes some products",
    ),
    Published(
        system="torchtitan, 2024-12",
        model="LLaMA-3.1 8B, 8192, compiled",
        machine="h100",
        ranks=8,
        flags=_llama("llama3.1-8b", 8192, 2, 16, f"{_ZERO_3} {_COMPILED}"),
        tokens_per_second=6667,
        remark="500 W cards; recomputes some products",
    ),
    Published(
        system="torchtitan, TP 8",
        model="LLaMA-3.1 8B, 8192",
        machine="h100",
        ranks=64,
        flags=_llama(
            "llama3.1-8b",
            8192,
            12,
            96,
            f"{_ZERO_3} {_COMPILED} --sequence-parallel --tensor-model-parallel-size 8",
        ),
        tokens_per_second=4378,
        remark="without asynchronous TP",
    ),
    Published(
        system="llm.c",
        model="GPT-2 1558M, 1024",
        machine="h100",
        ranks=8,
        flags="--preset gpt2-xl --bf16 --attention-dropout 0 --hidden-dropout 0 --seq-length 1024 "
        f"--micro-batch-size 16 --global-batch-size 1024 --zero-stage 1 {_COMPILED}",
        tokens_per_second=46800,
        remark="hand-written kernels",
    ),
    _foundry("MPT-1B", "h100", 8, 2048, 14, 112, 45455, False),
    _foundry("MPT-1B", "h100", 8, 4096, 7, 224, 38535, False),
    _foundry("MPT-1B", "h100", 8, 8192, 3, 96, 29157, False),
    _foundry("MPT-3B", "h100", 16, 2048, 10, 480, 24142, False),
    _foundry("MPT-3B", "h100", 8, 8192, 3, 144, 16578, False),
    _foundry("MPT-7B", "h100", 8, 2048, 6, 48, 10643, False),
    _foundry("MPT-7B", "h100", 8, 4096, 16, 256, 8611, True),
    _foundry("MPT-7B", "h100", 8, 8192, 8, 128, 6935, True),
    _foundry("MPT-30B", "h100", 32, 2048, 14, 1344, 2308, True),
    _foundry("MPT-70B", "h100", 64, 2048, 8, 2048, 1039, True),
    Published(
        system="Megatron-Bridge 25.11",
        model="LLaMA-3 8B, 8192, FP8",
        machine="h100",
        ranks=8,
        flags=_llama("llama3-8b", 8192, 1, 128, f"{_ZERO_3} {_COMPILED}"),
        tokens_per_second=14451,
        fp8=True,
    ),
    Published(
        system="Megatron-LM, examples/llama",
        model="LLaMA-3 8B, 8192, FP8, CP 2",
        machine="h100",
        ranks=8,
        flags=_llama("llama3-8b", 8192, 1, 128, f"--context-parallel-size 2 --use-distributed-optimizer {_COMPILED}"),
        tokens_per_second=13812,
        fp8=True,
    ),
    Published(
        system="Megatron-Bridge 26.02",
        model="LLaMA-3 70B, 8192, FP8",
        machine="h100",
        ranks=64,
        flags=_llama(
            "llama3-70b", 8192, 1, 256, f"{_TP} 4 {_PP} 8 --num-layers-per-virtual-pipeline-stage 2 {_COMPILED}"
        ),
        tokens_per_second=1621,
        fp8=True,
    ),
    Published(
        system="Megatron-Bridge 26.02",
        model="LLaMA-3.1 405B, 8192, FP8",
        machine="h100",
        ranks=1024,
        flags=_llama(
            "llama3.1-405b", 8192, 1, 1536, f"{_TP} 8 {_PP} 8 --context-parallel-size 2 {_COMPILED} {_COUNTED}"
        ),
        tokens_per_second=311,
        fp8=True,
    ),
    Published(
        system="torchtitan, 2024-12",
        model="LLaMA-3.1 8B, 8192, FP8",
        machine="h100",
        ranks=8,
        flags=_llama("llama3.1-8b", 8192, 2, 16, f"{_ZERO_3} {_COMPILED}"),
        tokens_per_second=8532,
        fp8=True,
        remark="500 W cards; recomputes some products",
    ),
    Published(
        system="torchtitan, Trainy",
        model="LLaMA-3.1 8B, 8192, FP8",
        machine="h200",
        ranks=32,
        flags=_llama("llama3.1-8b", 8192, 2, 64, f"{_ZERO_3} {_COMPILED}"),
        tokens_per_second=10938,
        fp8=True,
    ),
    Published(
        system="Colossal-AI, zero2",
        model="LLaMA-2 7B, 4096",
        machine="h200",
        ranks=8,
        flags=_llama("llama2-7b", 4096, 36, 288, f"--zero-stage 2 {_FULL}"),
        tokens_per_second=8771,
    ),
    Published(
        system="nanoGPT (a blog)",
        model="GPT-2 1558M, 1024",
        machine="h200",
        ranks=1,
        flags="--preset gpt2-xl --bf16 --attention-dropout 0 --hidden-dropout 0 --seq-length 1024 "
        f"--micro-batch-size 16 --global-batch-size 1024 {_COMPILED}",
        tokens_per_second=49900,
    ),
    Published(
        system="IBM fms-fsdp",
        model="LLaMA-2 7B, 4096",
        machine="a100",
        ranks=128,
        flags=_llama("llama2-7b", 4096, 2, 256, f"{_ZERO_3} --num-distributed-optimizer-instances 16 {_COMPILED}"),
        tokens_per_second=4550,
    ),
    _foundry("MPT-1B", "a100", 8, 2048, 14, 448, 20513, False),
    _foundry("MPT-1B", "a100", 8, 4096, 7, 224, 17807, False),
    _foundry("MPT-7B", "a100", 8, 2048, 6, 96, 4641, False),
    _foundry("MPT-7B", "a100", 8, 4096, 16, 256, 3684, True),
    _foundry("MPT-13B", "a100", 8, 2048, 2, 48, 2262, False),
    _foundry("MPT-30B", "a100", 8, 2048, 3, 504, 916, True),
    _foundry("MPT-70B", "a100", 64, 2048, 8, 2048, 410, True),
    Published(
        system="torchtitan, docs/performance",
        model="LLaMA-3 8B, 8192",
        machine="a100",
        ranks=64,
        flags=_llama("llama3-8b", 8192, 1, 64, f"{_ZERO_3} {_COMPILED}"),
        tokens_per_second=2973,
        remark="batch size guessed; recomputes some products",
    ),
    Published(
        system="TinyLlama",
        model="TinyLlama 1.1B, 2048",
        machine="a100",
        ranks=16,
        flags=f"{_TINYLLAMA} --seq-length 2048 --micro-batch-size 8 --global-batch-size 1024 {_ZERO_2} {_COMPILED}",
        tokens_per_second=24000,
        remark="40 GB cards",
    ),
    Published(
        system="Colossal-AI, gemini",
        model="LLaMA-2 7B, 4096",
        machine="a800",
        ranks=32,
        flags=_llama("llama2-7b", 4096, 16, 512, f"--zero-stage 3 {_FULL}"),
        tokens_per_second=3105,
    ),
    Published(
        system="Colossal-AI, gemini",
        model="LLaMA-1 65B, 2048",
        machine="a800",
        ranks=32,
        flags=_llama("llama1-65b", 2048, 12, 384, f"--zero-stage 3 {_FULL}"),
        tokens_per_second=339,
    ),
    Published(
        system="Intel, SW 1.19",
        model="LLaMA-2 7B, 4096, FP8",
        machine="gaudi2",
        ranks=8,
        flags=_llama("llama2-7b", 4096, 1, 1024, "--use-distributed-optimizer"),
        tokens_per_second=8815,
        fp8=True,
        remark="layout guessed",
    ),
    Published(
        system="Intel, SW 1.19",
        model="LLaMA-2 13B, 4096, FP8",
        machine="gaudi2",
        ranks=16,
        flags=_llama("llama2-13b", 4096, 1, 256, f"{_TP} 2"),
        tokens_per_second=3712,
        fp8=True,
        remark="layout guessed",
    ),
    Published(
        system="Intel, SW 1.19",
        model="LLaMA-2 70B, 4096, FP8",
        machine="gaudi2",
        ranks=64,
        flags=_llama("llama2-70b", 4096, 1, 1024, f"{_TP} 8 {_PP} 4"),
        tokens_per_second=853,
        fp8=True,
        remark="layout guessed",
    ),
    Published(
        system="Intel, SW 1.19",
        model="LLaMA-3.1 8B, 8192, FP8",
        machine="gaudi2",
        ranks=8,
        flags=_llama("llama3.1-8b", 8192, 1, 128, f"{_TP} 2"),
        tokens_per_second=4680,
        fp8=True,
        remark="layout guessed",
    ),
    Published(
        system="Intel, SW 1.19",
        model="LLaMA-3.1 70B, 8192, FP8",
        machine="gaudi2",
        ranks=64,
        flags=_llama("llama3.1-70b", 8192, 1, 128, f"{_TP} 8 {_PP} 4"),
        tokens_per_second=677,
        fp8=True,
        remark="layout guessed",
    ),
    Published(
        system="Databricks",
        model="MPT-7B, 2048",
        machine="gaudi2",
        ranks=8,
        flags=f"{_MPT_SIZES['MPT-7B']} {_MPT} --max-position-embeddings 2048 --seq-length 2048 {_ZERO_3} "
        "--micro-batch-size 8 --global-batch-size 64",
        tokens_per_second=6020,
        remark="derived from 260 TFLOP/s; batch size guessed",
    ),
    Published(
        system="AscendSpeed, ZeRO-2",
        model="LLaMA-1 7B, 2048",
        machine="ascend910b",
        ranks=8,
        flags="--preset llama1-7b --fp16 --seq-length 2048 --micro-batch-size 8 --global-batch-size 64 --deepspeed "
        f"--zero-stage 2 {_FULL} {UNFUSED}",
        tokens_per_second=2862,
    ),
    Published(
        system="AscendSpeed, PP 8",
        model="LLaMA-1 13B, 2048",
        machine="ascend910b",
        ranks=8,
        flags="--preset llama1-13b --fp16 --seq-length 2048 --micro-batch-size 1 --global-batch-size 128 "
        f"{_PP} 8 {UNFUSED}",
        tokens_per_second=1800,
        remark="recomputation of 6 of 40 layers left out",
    ),
    Published(
        system="AscendSpeed, TP 4, PP 4",
        model="LLaMA-1 33B, 2048",
        machine="ascend910b",
        ranks=32,
        flags="--preset llama1-30b --fp16 --seq-length 2048 --micro-batch-size 2 --global-batch-size 512 "
        f"{_TP} 4 {_PP} 4 {_FULL} {UNFUSED}",
        tokens_per_second=621,
    ),
    Published(
        system="AscendSpeed, TP 8, PP 4",
        model="LLaMA-1 65B, 2048",
        machine="ascend910b",
        ranks=32,
        flags="--preset llama1-65b --bf16 --seq-length 2048 --micro-batch-size 2 --global-batch-size 512 "
        f"{_TP} 8 {_PP} 4 {_FULL} {UNFUSED}",
        tokens_per_second=234,
    ),
    Published(
        system="AscendSpeed (flash), TP 8, PP 4",
        model="LLaMA-1 65B, 2048",
        machine="ascend910b",
        ranks=32,
        flags=_llama("llama1-65b", 2048, 2, 128, f"{_TP} 8 {_PP} 4"),
        tokens_per_second=348,
    ),
    Published(
        system="AWS, TP 32, ZeRO-1",
        model="LLaMA-3.1 8B, 8192",
        machine="trn1",
        ranks=1024,
        flags=_llama("llama3.1-8b", 8192, 1, 1024, f"{_TP} 32 --recompute-granularity selective"),
        tokens_per_second=383.6,
    ),
    Published(
        system="AWS, TP 32, PP 8, ZeRO-1",
        model="LLaMA-3.1 70B, 8192",
        machine="trn1",
        ranks=1024,
        flags=_llama("llama3.1-70b", 8192, 1, 1024, f"{_TP} 32 {_PP} 8 --recompute-granularity selective"),
        tokens_per_second=63.5,
    ),
)


@dataclass(frozen=True)
class Comparison:
    """A published result beside its estimate.

    Attributes:
        row: the result.
        estimate: tokens per second of one rank.
        needed: bytes that the run would need in this project.
    """

    row: Published
    estimate: float
    needed: int

    @property
    def error(self) -> float:
        """Relative error of the estimate: above 0 where the published run was slower."""
        return self.estimate / self.row.tokens_per_second - 1.0


def published_case(row: Published) -> Case:
    """The run of a row, planned."""
    request = read_request(row.flags.split(), row.ranks)
    resolved = resolve(request)
    if resolved.impossible:
        raise ValueError(f"{row.system}, {row.model}: {'; '.join(resolved.impossible)}")
    return replace(case_of(resolved.settings, request.vocab_size, machine(row.machine)), fp8=row.fp8)


def compare(rows: Sequence[Published] = PUBLISHED) -> list[Comparison]:
    """Every row beside its estimate."""
    cases = [(row, published_case(row)) for row in rows]
    return [Comparison(row, speed(case).tokens_per_second, worst_rank(case).peak.total) for row, case in cases]


def typical_error(found: Sequence[Comparison]) -> tuple[float, float]:
    """Median of the errors, and median of their sizes."""
    errors = [one.error for one in found]
    return statistics.median(errors), statistics.median(abs(error) for error in errors)
