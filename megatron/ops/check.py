"""`python -m megatron.ops.check`: error and speed of every implementation that this machine can run.

The error is that of the result and all gradients against the reference in float64, relative to the largest true value.
The speed is forward and backward against the reference in the same dtype, runs alternating, medians compared.
Leaves with status 1 if an error is above the implementation's tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron import accelerators
from megatron.accelerators import Accelerator
from megatron.ops import reference
from megatron.ops.registry import OPERATIONS, Implementation, implementations
from megatron.ops.samples import prepare, relative_error, samples


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found for one implementation in one dtype. `milliseconds` and `speedup` are None when not timed."""

    op: str
    implementation: str
    dtype: str
    error: float
    tolerance: float
    milliseconds: float | None
    speedup: float | None

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


def measure_error(implementation: Implementation, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error over the operation's small samples; NaN if any result or gradient has one."""
    definition = getattr(reference, implementation.op)
    errors = []
    for sample in samples(implementation.op, dtype, device, large=False):
        actual = prepare(implementation.op, implementation.function, sample)()
        oracle = prepare(implementation.op, definition, sample.to(torch.float64))()
        errors.append(relative_error(actual, oracle))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def measure_speed(
    candidates: Sequence[Implementation], dtype: torch.dtype, device: torch.device, accelerator: Accelerator, runs: int
) -> dict[str, float]:
    """Median seconds per implementation name, forward and backward, the candidates taking turns."""
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    sample = samples(candidates[0].op, dtype, device, large=True)[0]
    calls = {candidate.name: prepare(candidate.op, candidate.function, sample) for candidate in candidates}
    for run in range(runs + 1):
        for name, call in calls.items():
            accelerator.synchronize()
            start = time.perf_counter()
            call()
            accelerator.synchronize()
            if run > 0:  # the first is for warming up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def check(accelerator: Accelerator, ops: Sequence[str], dtypes: Sequence[torch.dtype], runs: int) -> list[Row]:
    """Measure every available implementation of `ops` in each of `dtypes`; `runs` 0 leaves the clock out."""
    device = accelerator.set_device(0)
    rows = []
    for op in ops:
        for dtype in dtypes:
            candidates = [
                candidate
                for candidate in implementations(accelerator, op)
                if not candidate.why_unavailable() and dtype in candidate.tolerance
            ]
            seconds = measure_speed(candidates, dtype, device, accelerator, runs) if runs else {}
            for candidate in candidates:
                taken = seconds.get(candidate.name)
                rows.append(
                    Row(
                        op=op,
                        implementation=candidate.name,
                        dtype=str(dtype).removeprefix("torch."),
                        error=measure_error(candidate, dtype, device),
                        tolerance=candidate.tolerance[dtype],
                        milliseconds=None if taken is None else taken * 1e3,
                        speedup=None if taken is None else seconds["reference"] / taken,
                    )
                )
    return rows


def unavailable(accelerator: Accelerator, ops: Sequence[str]) -> list[str]:
    """One line per implementation that cannot run here, with the reason."""
    return [
        f"{op}={candidate.name}: {reason}"
        for op in ops
        for candidate in implementations(accelerator, op)
        if (reason := candidate.why_unavailable())
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'operation':25}{'implementation':26}{'dtype':10}{'error':>9}{'allowed':>9}{'ms':>9}{'speed':>8}"]
    for row in rows:
        timed = "" if row.milliseconds is None else f"{row.milliseconds:9.2f}{row.speedup:7.2f}x"
        verdict = "" if row.passed else "  ERROR TOO LARGE"
        lines.append(
            f"{row.op:25}{row.implementation:26}{row.dtype:10}{row.error:9.1e}{row.tolerance:9.0e}{timed}{verdict}"
        )
    return "\n".join(lines)


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron.ops.check", description=(__doc__ or "").partition("\n")[2]
    )
    dtypes = ("float64", "float32", "bfloat16", "float16")
    parser.add_argument("--device", default="auto", help="auto or one of " + ", ".join(accelerators.DEVICES))
    parser.add_argument("--dtype", type=_names(dtypes), default=["float32", "bfloat16"], help="comma-separated")
    parser.add_argument("--op", type=_names(OPERATIONS), default=list(OPERATIONS), help="comma-separated; default all")
    parser.add_argument("--runs", type=int, default=9, help="timed runs per implementation; 0 for none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        accelerator = accelerators.select(options.device)
    except accelerators.UnavailableDeviceError as error:
        parser.error(str(error))
    rows = check(accelerator, options.op, [getattr(torch, name) for name in options.dtype], options.runs)
    missing = unavailable(accelerator, options.op)
    if options.json:
        report: dict[str, Any] = {
            "device": accelerator.device_description(),
            "torch": torch.__version__,
            "rows": [dataclasses.asdict(row) | {"passed": row.passed} for row in rows],
            "unavailable": missing,
        }
        print(json.dumps(report, indent=1))
    else:
        print(f"{accelerator.name}: {accelerator.device_description()}, torch {torch.__version__}\n{table(rows)}")
        for line in missing:
            print(f"unavailable: {line}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
