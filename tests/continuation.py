"""Saves a run in one layout, engine or device and goes on in another; the losses must be those without the break.

    python -m tests.continuation --write docs/parity.md

Each pair takes a run of `SAVED + STEPS` steps that saves on its way, and a run that goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parity import (
    DROPLESS,
    FLOAT32_TOLERANCE,
    MODEL,
    ONE_HEAD,
    TWO_HEADS,
    Curve,
    Layout,
    Start,
    curve,
    difference,
    on_cpu,
    write_section,
)

SAVED, STEPS = 5, 10
ROUNDED_TOLERANCE = 5e-3
"""Relative, of 16-bit runs in different layouts: they round sums of 8 or 11 bits in another order."""


@dataclass(frozen=True)
class End:
    """How a run is made that saves, or one that goes on."""

    name: str
    ranks: int
    flags: tuple[str, ...] = ()
    model: tuple[str, ...] = MODEL
    device: str = "cpu"

    @property
    def rounded(self) -> bool:
        """Whether the model computes with 16 bits."""
        return bool({"--bf16", "--fp16"} & set(self.flags))


def _native(name: str, ranks: int, flags: str = "", **rest: object) -> End:
    return End(f"native {name}", ranks, tuple(flags.split()), **rest)  # type: ignore[arg-type]


def _deepspeed(name: str, ranks: int, flags: str, **rest: object) -> End:
    return End(f"DeepSpeed {name}", ranks, ("--deepspeed", *flags.split()), **rest)  # type: ignore[arg-type]


_TP, _PP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
_TIED = tuple(word for word in MODEL if word != "--untie-embeddings-and-output-weights")
ONE = _native("1 process", 1)
TP2 = _native("TP2", 2, f"{_TP} --sequence-parallel")
DP2 = _native("DP2", 2)
DP2_SHARDED = _native("DP2, stage 3", 2, "--zero-stage 3")
PP2 = _native("PP2", 2, _PP)
TP2_DP2 = _native("TP2 DP2, stage 1", 4, f"{_TP} --zero-stage 1")
TP2_PP2 = _native("TP2 PP2", 4, f"{_TP} {_PP}")
PP2_DP2 = _native("PP2 DP2", 4, _PP)
DP4 = _native("DP4, stage 2", 4, "--zero-stage 2")
ONE_TIED = _native("1 process, tied", 1, model=_TIED)
ONE_BF16 = _native("1 process, bfloat16", 1, "--bf16")
DP2_BF16 = _native("DP2, bfloat16", 2, "--bf16")
ZERO = [_deepspeed(f"ZeRO-{stage} DP2", 2, f"--zero-stage {stage}") for stage in range(4)]
ZERO_2_TP2 = _deepspeed("ZeRO-2 TP2 DP2", 4, f"--zero-stage 2 {_TP}")
ZERO_3_TP2 = _deepspeed("ZeRO-3 TP2 DP2", 4, f"--zero-stage 3 {_TP} --sequence-parallel")
ZERO_3_DP4 = _deepspeed("ZeRO-3 DP4", 4, "--zero-stage 3")
HOST = _deepspeed("ZeRO-2 DP2, on the host", 2, "--zero-stage 2 --cpu-optimizer --cpu_torch_adam")
HOST_ADAM = _deepspeed("ZeRO-2 DP2, its Adam on the host", 2, "--zero-stage 2 --cpu-optimizer")
HOST_3 = _deepspeed("ZeRO-3 DP2, on the host", 2, "--zero-stage 3 --cpu-optimizer --cpu_torch_adam")
DS_PP2 = _deepspeed("PP2", 2, f"--zero-stage 1 {_PP}")
DS_PP2_DP2 = _deepspeed("PP2 DP2", 4, f"--zero-stage 1 {_PP}")
DS_PP2_TP2 = _deepspeed("PP2 TP2", 4, f"--zero-stage 1 {_PP} {_TP}")
DS_PP2_TIED = _deepspeed("PP2 DP2, tied", 4, f"--zero-stage 1 {_PP}", model=_TIED)
BF16 = [_deepspeed(f"ZeRO-{stage} DP2, bfloat16", 2, f"--zero-stage {stage} --bf16") for stage in (1, 2, 3)]
_FP16 = "--fp16 --initial-loss-scale 65536"
ZERO_FP16 = _deepspeed("ZeRO-2 DP2 on hpu, float16", 2, f"--zero-stage 2 {_FP16}", device="hpu")
"""DeepSpeed has no float16 on a CPU."""
DP2_FP16 = _native("DP2, float16", 2, _FP16)
HPU = _native("TP2 on hpu", 2, _TP, device="hpu")
HPU_ZERO_1 = _deepspeed("ZeRO-1 DP2 on hpu", 2, "--zero-stage 1", device="hpu")
NPU = _native("DP2 on npu", 2, "--zero-stage 3", device="npu")
NPU_ZERO_3 = _deepspeed("ZeRO-3 DP2 on npu", 2, "--zero-stage 3", device="npu")
NEURON = _native("PP2 on neuron", 2, _PP, device="neuron")
FUSED = _native("1 process, adamw=fused", 1, "--op adamw=fused --optimizer adamw")
PLAIN = _native("1 process, adamw=reference", 1, "--op adamw=reference --optimizer adam")
CP2 = _native("CP2", 2, "--context-parallel-size 2")
TP4_COPIES = _native("TP4, 2 kv heads", 4, "--tensor-model-parallel-size 4", model=TWO_HEADS)
TWO_COPIES = _native("1 process, 2 kv heads", 1, model=TWO_HEADS)
ZERO_1_COPIES = _deepspeed("ZeRO-1 TP2, 1 kv head", 2, f"--zero-stage 1 {_TP}", model=ONE_HEAD)
DP2_COPIES = _native("DP2, 1 kv head", 2, model=ONE_HEAD)
_EP = "--moe-expert-parallel-size 2"
EP2 = _native("EP2", 2, _EP, model=DROPLESS)
EP2_TP2 = _native("EP2 TP2", 4, f"{_EP} {_TP}", model=DROPLESS)
ONE_EXPERTS = _native("1 process, experts", 1, model=DROPLESS)
ZERO_1_EP2 = _deepspeed("ZeRO-1 EP2", 2, f"--zero-stage 1 {_EP}", model=DROPLESS)
ZERO_2_EP2 = _deepspeed("ZeRO-2 EP2 DP4", 4, f"--zero-stage 2 {_EP}", model=DROPLESS)

PAIRS: tuple[tuple[End, End], ...] = (
    *((end, end) for end in (ONE, TP2_DP2, DP2_SHARDED, PP2, *ZERO, ZERO_3_TP2, DS_PP2, DS_PP2_TIED, HOST)),
    *((end, end) for end in (DP2_BF16, *BF16, ZERO_FP16)),
    *((TP2, DP2), (DP2, TP2), (TP2, PP2), (PP2, TP2), (PP2, ONE), (TP2_PP2, DP4)),
    *((DP2, ZERO[0]), (TP2, ZERO[1]), (DP2_SHARDED, ZERO[2]), (ONE, ZERO[3]), (DP4, ZERO_2_TP2), (PP2, DS_PP2)),
    *((ZERO[0], TP2), (ZERO[1], PP2), (ZERO_2_TP2, PP2_DP2), (ZERO[3], ONE), (ZERO_3_TP2, ONE), (DS_PP2, DP2)),
    *((ZERO[2], ZERO_3_DP4), (ZERO_3_DP4, ZERO[1]), (DS_PP2_TP2, ZERO[0]), (ZERO[0], DS_PP2_DP2)),
    *((DS_PP2_TIED, ONE_TIED), (ONE_TIED, DS_PP2_TIED), (HOST, ONE), (ONE, HOST), (HOST_3, ZERO[1]), (ONE, HOST_ADAM)),
    *((HOST_ADAM, ONE), (FUSED, PLAIN), (PLAIN, FUSED)),
    *((BF16[0], ONE_BF16), (ONE_BF16, BF16[2]), (DP2_BF16, BF16[1]), (ZERO_FP16, DP2_FP16), (DP2_FP16, ZERO_FP16)),
    *((CP2, ZERO[2]), (TP4_COPIES, TWO_COPIES), (TWO_COPIES, TP4_COPIES)),
    *((ZERO_1_COPIES, DP2_COPIES), (DP2_COPIES, ZERO_1_COPIES)),
    *((EP2, EP2), (ZERO_1_EP2, ZERO_1_EP2), (EP2, ONE_EXPERTS), (ONE_EXPERTS, EP2_TP2), (EP2_TP2, ZERO_2_EP2)),
    *((ZERO_1_EP2, ONE_EXPERTS), (ONE_EXPERTS, ZERO_1_EP2), (ZERO_2_EP2, EP2)),
    *((HPU, ONE), (ONE, HPU), (HPU_ZERO_1, PP2), (NPU, ONE), (NPU_ZERO_3, ONE), (ZERO[3], NPU), (NEURON, DP2)),
)


def tolerance(save: End, resume: End) -> float:
    """Largest relative difference of a loss that is allowed: none where nothing but the break differs."""
    if save == resume:
        return 0.0
    return ROUNDED_TOLERANCE if save.rounded or resume.rounded else FLOAT32_TOLERANCE


def draw(number: int, seed: str) -> list[tuple[End, End]]:
    """Some pairs on this machine's own device, drawn by lot."""
    here = [pair for pair in PAIRS if {end.device for end in pair} == {"cpu"} and HOST_ADAM not in pair]
    return random.Random(seed).sample(here, number)


def worst(save: End, resume: End, folder: Path) -> float:
    """Largest relative difference between the losses and gradient norms of a run and of one that goes on from it.

    Args:
        save, resume: how the first run, and the one that goes on, are made.
        folder: for the checkpoints of runs that save, which later calls use again.
    """
    whole = _saving(save, folder)
    found = _train(resume, ("--load", str(folder / save.name), "--ckpt-step", str(SAVED)))
    if len(found.losses) != STEPS:
        raise AssertionError(f"{save.name} -> {resume.name}: {len(found.losses)} steps instead of {STEPS}")
    losses = difference(found.losses, whole.losses[SAVED:])
    return max(losses, difference(found.norms, whole.norms[SAVED:]))


@functools.cache
def _saving(end: End, folder: Path) -> Curve:
    return _train(end, ("--save", str(folder / end.name), "--save-interval", str(SAVED)))


def _train(end: End, flags: Sequence[str]) -> Curve:
    layout = Layout(end.name, end.ranks, end.flags, model=end.model)
    return curve(layout, ("--device", end.device, *flags), SAVED + STEPS, start=_start(end.device))


def _start(device: str) -> Start:
    if device == "cpu":
        return on_cpu
    from tests.sim.run import run_on_sim

    return lambda ranks, function, argv, timeout: run_on_sim(
        device, function, argv, world_size=ranks, join=False, timeout=timeout
    )


def table(pairs: Sequence[tuple[End, End]]) -> list[str]:
    """Rows of a Markdown table; a difference above what is allowed is marked."""
    rows = ["| saved by | ranks | continued by | ranks | difference | allowed |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for save, resume in pairs:
            found, allowed = worst(save, resume, Path(folder)), tolerance(save, resume)
            mark = "" if found <= allowed else " **too much**"
            text = "bit-equal" if found == 0.0 else f"{found:.1e}{mark}"
            limit = "none" if allowed == 0.0 else f"{allowed:.0e}"
            rows.append(f"| {save.name} | {save.ranks} | {resume.name} | {resume.ranks} | {text} | {limit} |")
            sys.stderr.write(rows[-1] + "\n")
    return rows


HEADING = f"""## A checkpoint continues in every layout, engine and device

Written by `python -m tests.continuation --write docs/parity.md`, with the model above (two layers, also in pipelines).
A run of {SAVED + STEPS} steps saves after {SAVED}; another one goes on from there. The difference is the largest
relative one of any loss or gradient norm of the {STEPS} steps after the break. hpu, npu and neuron are
[simulated devices](simulated-devices.md).
"""


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="Markdown file")
    write_section(parser.parse_args().write, HEADING, table(PAIRS))


if __name__ == "__main__":
    main()
