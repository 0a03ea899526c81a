"""Trains one small model in many layouts and compares every loss and gradient norm with the one-process run.

    python -m tests.parity --write docs/parity.md

Runs go through the command line's own path (`parse`, `run`); numbers come from the metrics file.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support import run_ranks

STEPS = 20
SHORT = 4
"""Steps of a test: the first one has a learning rate of 0, so that two updates show in the third and the fourth."""
FLOAT32_TOLERANCE = 1e-5
"""Relative. Sums in another order differ by about 1e-7 per step in float32; 20 steps of Adam let that grow."""

MODEL = (
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "8", "--num-key-value-heads", "4"),
    *("--ffn-hidden-size", "96", "--seq-length", "32", "--max-position-embeddings", "32", "--vocab-size", "100"),
    *("--position-embedding-type", "rope", "--normalization", "rmsnorm", "--swiglu", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--make-vocab-size-divisible-by", "8", "--init-method-std", "0.1"),
)
TRAINING = (
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--num-workers", "0", "--eval-iters", "0"),
    *(
        "--lr",
        "1e-3",
        "--lr-decay-style",
        "cosine",
        "--lr-warmup-fraction",
        "0.1",
        "--clip-grad",
        "0.5",
        "--log-interval",
        "1",
    ),
    *("--weight-decay", "0.1", "--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"),
)


NATIVE = {f"native stage {stage}": ("--zero-stage", str(stage)) for stage in (0, 1, 2, 3)}
DEEPSPEED = {f"DeepSpeed ZeRO-{stage}": ("--deepspeed", "--zero-stage", str(stage)) for stage in (0, 1, 2, 3)}
ENGINES = {**NATIVE, **DEEPSPEED}


@dataclass(frozen=True)
class Layout:
    """One way to train a model."""

    name: str
    ranks: int
    flags: tuple[str, ...] = ()
    engines: tuple[str, ...] = tuple(ENGINES)
    model: tuple[str, ...] = MODEL


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm of every step."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]


_TENSOR = ("--tensor-model-parallel-size",)
SHALLOW = (
    Layout("1 process", 1),
    Layout("TP2", 2, (*_TENSOR, "2")),
    Layout("TP2 SP", 2, (*_TENSOR, "2", "--sequence-parallel")),
    Layout("TP4", 4, (*_TENSOR, "4")),
    Layout("DP2", 2),
    Layout("TP2 DP2", 4, (*_TENSOR, "2")),
)
DEEP = (*MODEL, "--num-layers", "4")
TWO_HEADS, ONE_HEAD = ((*MODEL, "--num-key-value-heads", heads, "--add-qkv-bias") for heads in ("2", "1"))
TIED = tuple(word for word in DEEP if word != "--untie-embeddings-and-output-weights")


def _pipeline(
    name: str,
    ranks: int,
    *flags: str,
    size: int = 2,
    stages: tuple[int, ...] = (1,),
    tied: bool = False,
    deepspeed: bool = False,
) -> Layout:
    """A pipeline with the native engine at some stages of sharding, and with DeepSpeed at the one it has."""
    words = ("--pipeline-model-parallel-size", str(size), *flags)
    engines = [f"native stage {stage}" for stage in stages] + ["DeepSpeed ZeRO-1"] * deepspeed
    return Layout(name, ranks, words, tuple(engines), TIED if tied else DEEP)


_PIPELINE, _BOTH = ("--pipeline-model-parallel-size", "2"), ("native stage 1", "DeepSpeed ZeRO-1")
_SCHEDULE, _VIRTUAL = "--pipeline-schedule", ("--num-virtual-stages-per-pipeline-rank", "2")
_LAYOUT = "--pipeline-model-parallel-layout"
PIPELINES = (
    _pipeline("PP2 gpipe", 2, _SCHEDULE, "gpipe"),
    _pipeline("PP2 1f1b", 2, deepspeed=True),
    _pipeline("PP2 interleaved", 2, *_VIRTUAL),
    _pipeline("PP2 zero-bubble", 2, _SCHEDULE, "zero-bubble"),
    _pipeline("PP2 zero-bubble, 2 stages per rank", 2, _SCHEDULE, "zero-bubble", *_VIRTUAL),
    _pipeline("PP2 zbv", 2, _SCHEDULE, "zbv"),
    _pipeline("PP4 1f1b", 4, size=4, deepspeed=True),
    _pipeline("PP2 uneven", 2, _LAYOUT, "Ettt|tL", deepspeed=True),
    _pipeline("PP4 zero-bubble", 4, _SCHEDULE, "zero-bubble", size=4),
    _pipeline("PP4 uneven, layers alone in the middle", 4, _LAYOUT, "E|ttt|t|L", size=4),
    _pipeline("PP2 DP2 1f1b", 4, stages=(0, 1, 2, 3), deepspeed=True),
    _pipeline("PP2 DP2 interleaved", 4, *_VIRTUAL, stages=(0, 1, 2, 3)),
    _pipeline("PP2 DP2 zbv", 4, _SCHEDULE, "zbv", stages=(0, 1)),
    _pipeline("PP2 TP2 1f1b", 4, *_TENSOR, "2", deepspeed=True),
    _pipeline("PP2 TP2 SP 1f1b", 4, *_TENSOR, "2", "--sequence-parallel", deepspeed=True),
    _pipeline("PP2 TP2 SP zbv", 4, *_TENSOR, "2", "--sequence-parallel", _SCHEDULE, "zbv"),
    _pipeline("PP2 1f1b, recomputed", 2, "--recompute-granularity", "full", deepspeed=True),
    _pipeline("PP2 zero-bubble, recomputed", 2, "--recompute-granularity", "full", _SCHEDULE, "zero-bubble"),
    _pipeline("PP2 zbv, recomputed", 2, "--recompute-granularity", "selective", _SCHEDULE, "zbv"),
    _pipeline("PP4 1f1b, tied embeddings", 4, size=4, tied=True, deepspeed=True),
    _pipeline("PP2 DP2 interleaved, tied embeddings", 4, *_VIRTUAL, stages=(1, 3), tied=True),
    _pipeline("PP2 DP2 zbv, tied embeddings", 4, _SCHEDULE, "zbv", stages=(0, 1), tied=True),
)
_CONTEXT, _ULYSSES = ("--context-parallel-size",), ("--ds-sequence-parallel-size",)
_LEARNED = ("--position-embedding-type", "learned_absolute")
_NATIVE = tuple(f"native stage {stage}" for stage in (0, 1, 3))
_ENGINES = (*_NATIVE, *(f"DeepSpeed ZeRO-{stage}" for stage in (0, 1, 3)))
_ONE = ("native stage 1", "DeepSpeed ZeRO-1")
SEQUENCES = (
    Layout("CP2", 2, (*_CONTEXT, "2"), _ENGINES),
    Layout("CP4", 4, (*_CONTEXT, "4"), _ENGINES),
    Layout("CP2 DP2", 4, (*_CONTEXT, "2"), _ENGINES),
    Layout("CP2 TP2", 4, (*_CONTEXT, "2", *_TENSOR, "2"), _ONE),
    Layout("CP2 TP2 SP", 4, (*_CONTEXT, "2", *_TENSOR, "2", "--sequence-parallel"), _ENGINES),
    Layout("CP2 PP2", 4, (*_CONTEXT, "2", "--pipeline-model-parallel-size", "2"), (*_NATIVE, "DeepSpeed ZeRO-1"), DEEP),
    Layout("CP2, recomputed", 2, (*_CONTEXT, "2", "--recompute-granularity", "full"), _ONE),
    Layout("CP2, window", 2, (*_CONTEXT, "2"), _ONE, (*MODEL, "--window-size", "9")),
    Layout("CP2, ALiBi", 2, (*_CONTEXT, "2"), _ONE, (*MODEL, "--position-embedding-type", "alibi")),
    Layout("CP2, learned positions", 2, (*_CONTEXT, "2"), _ONE, (*MODEL, *_LEARNED)),
    Layout("Ulysses 2", 2, (*_ULYSSES, "2"), _ENGINES),
    Layout("Ulysses 4", 4, (*_ULYSSES, "4"), _ENGINES),
    Layout("Ulysses 4, 2 kv heads", 4, (*_ULYSSES, "4"), _ONE, (*MODEL, "--num-key-value-heads", "2")),
    Layout("Ulysses 2 DP2", 4, (*_ULYSSES, "2"), _ENGINES),
    Layout("Ulysses 2 TP2 SP", 4, (*_ULYSSES, "2", *_TENSOR, "2", "--sequence-parallel"), _ENGINES),
    Layout("Ulysses 2 PP2", 4, (*_ULYSSES, "2", "--pipeline-model-parallel-size", "2"), _ONE, DEEP),
    Layout("CP2 Ulysses 2", 4, (*_CONTEXT, "2", *_ULYSSES, "2"), _ONE),
)
"""Ranks that share every sequence."""
_SPLIT = (_SCHEDULE, "zero-bubble")
_HALVES = ("--num-distributed-optimizer-instances", "2")
COPIES = (
    Layout("TP4, 2 kv heads", 4, (*_TENSOR, "4"), model=TWO_HEADS),
    Layout("TP4 SP, 2 kv heads", 4, (*_TENSOR, "4", "--sequence-parallel"), model=TWO_HEADS),
    Layout("TP2, 1 kv head", 2, (*_TENSOR, "2"), model=ONE_HEAD),
    Layout("TP2 SP DP2, 1 kv head", 4, (*_TENSOR, "2", "--sequence-parallel"), model=ONE_HEAD),
    Layout("TP2 DP4 in 2 copies, 1 kv head", 8, (*_TENSOR, "2", *_HALVES), ("native stage 1",), ONE_HEAD),
    Layout("PP2 TP2 SP, 1 kv head", 4, (*_PIPELINE, *_TENSOR, "2", "--sequence-parallel"), _BOTH, ONE_HEAD),
    Layout("PP2 TP2 zero-bubble, 1 kv head", 4, (*_PIPELINE, *_TENSOR, "2", *_SPLIT), ("native stage 1",), ONE_HEAD),
    Layout("PP2 TP4, 2 kv heads", 8, (*_PIPELINE, *_TENSOR, "4"), _BOTH, TWO_HEADS),
)
"""More tensor-parallel ranks than key-value heads."""
MOE = (
    *(*MODEL, "--num-experts", "4", "--topk", "2", "--expert-interval", "1", "--disable-moe-top2-2nd-expert-sampling"),
    *("--moe-loss-coeff", "0.1", "--moe-z-loss-coeff", "0.01"),
)
DROPLESS = (*MOE, "--disable-moe-token-dropping")
_EXPERTS, _OF_EXPERTS = ("--moe-expert-parallel-size",), ("DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2")
EXPERTS = (
    Layout("TP2, experts", 2, (*_TENSOR, "2"), _BOTH, DROPLESS),
    Layout("EP2", 2, (*_EXPERTS, "2"), (*_NATIVE, *_OF_EXPERTS), DROPLESS),
    Layout("EP2, capacity 1", 2, (*_EXPERTS, "2"), _BOTH, MOE),
    Layout("EP2 CP2", 2, (*_EXPERTS, "2", *_CONTEXT, "2"), ("native stage 1",), DROPLESS),
    Layout("EP2, recomputed", 2, (*_EXPERTS, "2", "--recompute-granularity", "full"), ("native stage 1",), DROPLESS),
    Layout("EP4", 4, (*_EXPERTS, "4"), (*_NATIVE, *_OF_EXPERTS), DROPLESS),
    Layout("EP2 DP4", 4, (*_EXPERTS, "2"), (*_NATIVE, *_OF_EXPERTS), DROPLESS),
    Layout("EP2 TP2", 4, (*_EXPERTS, "2", *_TENSOR, "2"), _BOTH, DROPLESS),
    Layout("EP2 TP2 SP", 4, (*_EXPERTS, "2", *_TENSOR, "2", "--sequence-parallel"), (*_NATIVE, *_OF_EXPERTS), DROPLESS),
    Layout("EP2 PP2", 4, (*_EXPERTS, "2", *_PIPELINE), _NATIVE, DROPLESS),
    Layout("EP2 PP2 zero-bubble", 4, (*_EXPERTS, "2", *_PIPELINE, _SCHEDULE, "zero-bubble"), _NATIVE[1:2], DROPLESS),
)
"""Mixtures of experts; a capacity is that of a micro-batch of one data-parallel rank, which one process has as well."""
LAYOUTS = (*SHALLOW, *PIPELINES, *SEQUENCES, *COPIES, *EXPERTS)


def train(argv: Sequence[str]) -> None:
    """One rank of one run; for `run_ranks`."""
    import warnings

    from megatron.config.run import parse
    from megatron.training.checkpoint_args import read_settings
    from megatron.training.run import run

    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    run(parse(argv, os.environ, read_record=read_settings))


def in_turn(runs: Sequence[Sequence[str]]) -> list[str]:
    """Train one after the other in this process; what each run ends with."""
    ends = []
    for words in runs:
        try:
            train(words)
            ends.append("")
        except ValueError as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends


Start = Callable[[int, Callable[[Sequence[str]], None], Sequence[str], float], object]
"""Calls a function with an argument on a number of ranks, within a number of seconds."""


def on_cpu(ranks: int, function: Callable[[Sequence[str]], None], argv: Sequence[str], timeout: float) -> object:
    """Start processes on this machine; a `Start`."""
    return run_ranks(ranks, function, argv, init=False, timeout=timeout)


def curve(
    layout: Layout, flags: Sequence[str] = (), steps: int = STEPS, timeout: float = 300.0, start: Start = on_cpu
) -> Curve:
    """Train in a layout; flags given later win."""
    from megatron.training.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        argv = [*layout.model, *TRAINING, "--mock-data", "--train-iters", str(STEPS), "--exit-interval", str(steps)]
        argv += ["--log-json", str(metrics), *layout.flags, *flags]
        start(layout.ranks, train, argv, timeout)
        records = [record for record in read_metrics(metrics) if record["kind"] == "train"]
    if not records or records[-1]["iteration"] != steps:
        raise AssertionError(f"{layout.name}: the run did not reach step {steps}")
    return Curve(tuple(r["lm_loss"] for r in records), tuple(r["grad_norm"] for r in records))


@functools.cache
def one_process(model: tuple[str, ...] = MODEL, steps: int = STEPS) -> Curve:
    """Train a model in one process: what every layout is compared with."""
    return curve(Layout("1 process", 1, model=model), steps=steps)


def layout_of(name: str) -> Layout:
    """The layout of that name."""
    return next(layout for layout in LAYOUTS if layout.name == name)


def agrees(layout: Layout, engine: str, steps: int, flags: Sequence[str] = ()) -> bool:
    """Whether losses and gradient norms are those of one process without `flags`.

    `engine` is of `ENGINES`, or "" for the default.
    """
    found, expected = curve(layout, (*ENGINES.get(engine, ()), *flags), steps), one_process(layout.model, steps)
    worst = max(difference(found.losses, expected.losses), difference(found.norms, expected.norms))
    return worst <= FLOAT32_TOLERANCE


def difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(found, expected, strict=True))


def matrix(layouts: Sequence[Layout], known: Mapping[tuple[str, str], str]) -> list[str]:
    """Rows of a Markdown table: largest relative difference of loss and gradient norm from one process.

    Args:
        layouts: rows for each of them and its engines.
        known: rows by name of layout and engine, which are taken instead of running.
    """
    rows = ["| layout | ranks | engine | loss | gradient norm |", "|---|---|---|---|---|"]
    for layout in layouts:
        for engine in layout.engines:
            if (layout.name, engine) in known:
                rows.append(known[layout.name, engine])
                continue
            found, expected = curve(layout, ENGINES[engine]), one_process(layout.model)
            loss, norm = difference(found.losses, expected.losses), difference(found.norms, expected.norms)
            rows.append(f"| {layout.name} | {layout.ranks} | {engine} | {loss:.1e} | {norm:.1e} |")
            sys.stderr.write(rows[-1] + "\n")
    return rows


HEADING = f"""# Every layout gives the same numbers

Written by `python -m tests.parity --write docs/parity.md`: a LLaMA of two layers (four with a pipeline) with
grouped-query attention, document masks and masked losses, float32 on the CPU, {STEPS} steps of AdamW with clipping and
gradient accumulation. The figures are the largest relative difference of any step's loss and gradient norm from the
one-process native run; the tests demand at most {FLOAT32_TOLERANCE:.0e}.
"""


HALF_HEADING = """## The same in bfloat16

The same runs with `--bf16` on both sides. Weights are float32, activations have 8 bits: layouts round sums of them in
another order, and 20 steps of Adam let that grow.
"""


def in_half() -> tuple[Layout, ...]:
    """One layout of each kind, in bfloat16 like the one process that it is compared with."""
    names = ("TP2 SP", "TP2 DP2", "PP2 1f1b", "CP2", "Ulysses 2", "TP2, 1 kv head", "EP2")
    engines = ("native stage 1", "native stage 3", "DeepSpeed ZeRO-1")
    return tuple(
        replace(
            layout,
            name=f"{layout.name}, bfloat16",
            model=(*layout.model, "--bf16"),
            engines=tuple(engine for engine in engines if engine in layout.engines),
        )
        for layout in map(layout_of, names)
    )


def write_section(path: Path, heading: str, rows: Sequence[str]) -> None:
    """Write a chapter of a Markdown file, in the place of the one with its title, or at the end."""
    chapters = re.split(r"^(?=##? )", path.read_text(encoding="utf-8") if path.exists() else "", flags=re.MULTILINE)
    title = heading.splitlines()[0]
    at = next((i for i, chapter in enumerate(chapters) if chapter.splitlines()[:1] == [title]), len(chapters))
    chapters[at : at + 1] = ["\n".join([heading, *rows, ""])]
    path.write_text("\n".join(chapter.strip("\n") + "\n" for chapter in chapters if chapter), encoding="utf-8")


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="Markdown file")
    parser.add_argument("--missing", action="store_true", help="run only what the file has no row of")
    args = parser.parse_args()
    known = _rows_of(args.write.read_text(encoding="utf-8")) if args.missing else {}
    write_section(args.write, HEADING, matrix(LAYOUTS, known))
    write_section(args.write, HALF_HEADING, matrix(in_half(), known))


def _rows_of(text: str) -> dict[tuple[str, str], str]:
    """The rows of `matrix` in a text, by name of layout and engine."""
    rows = re.finditer(r"^\| ([^|]+) \| \d+ \| ([^|]+) \| \S+ \| \S+ \|$", text, flags=re.MULTILINE)
    return {(row[1], row[2]): row[0] for row in rows}


if __name__ == "__main__":
    main()
