"""Compares the losses of two runs, iteration by iteration: ours, or those that other trainers logged.

A device is trusted when its losses follow those of another one. Huawei accepts a mean relative error of 2 % between NPU
and GPU, and compares every step of its own tests with the same bound.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.training.metrics import read_metrics
from megatron.training.report import ReportError

THRESHOLD = 0.02

Point = tuple[int, float]
"""An iteration, counted from 1, and a loss in nats; NaN where the log has none."""


@dataclass(frozen=True)
class Curve:
    """The training losses that a run logged.

    Attributes:
        losses: iteration -> mean loss of the iterations since the one before; NaN where it was not a number.
        interval: iterations between two of them.
    """

    losses: Mapping[int, float]
    interval: int


@dataclass(frozen=True)
class Difference:
    """One iteration of both runs; losses in nats."""

    iteration: int
    reference: float
    candidate: float

    @property
    def absolute(self) -> float:
        """Distance of the losses; infinite where one is not a number."""
        distance = abs(self.candidate - self.reference)
        return distance if math.isfinite(distance) else math.inf

    @property
    def relative(self) -> float:
        """The same as a fraction of the reference's."""
        if self.absolute in (0.0, math.inf):
            return self.absolute
        return self.absolute / abs(self.reference) if self.reference else math.inf


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs beside each other.

    Attributes:
        steps: the iterations that both have, at least one.
        threshold: largest relative error that is allowed.
        only_reference: losses of the reference without a counterpart.
        only_candidate: losses of the candidate without a counterpart.
    """

    steps: tuple[Difference, ...]
    threshold: float
    only_reference: int
    only_candidate: int

    @property
    def first_over(self) -> Difference | None:
        """The first iteration whose error is above the threshold."""
        return next((step for step in self.steps if step.relative > self.threshold), None)

    @property
    def worst(self) -> Difference:
        """The iteration with the largest relative error."""
        return max(self.steps, key=lambda step: step.relative)

    @property
    def mean_absolute(self) -> float:
        """Mean absolute error in nats."""
        return statistics.fmean(step.absolute for step in self.steps)

    @property
    def mean_relative(self) -> float:
        """Mean relative error."""
        return statistics.fmean(step.relative for step in self.steps)

    @property
    def passed(self) -> bool:
        """Whether no error is above the threshold."""
        return self.first_over is None


def read_curve(path: Path) -> Curve:
    """The training losses in a file: our metrics (JSON lines), or what a run printed.

    Printed lines are those of Megatron-LM, Megatron-DeepSpeed, AscendSpeed and Gaudi's Megatron-DeepSpeed, or of
    neuronx-distributed, or DeepSpeed's own. Words before a line, such as ranks and times, do not matter. Where a run
    was resumed, what was trained again counts once.

    Raises:
        ReportError: the file cannot be read, or has no losses.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as problem:
        raise ReportError(f"{path}: {problem.strerror}") from None
    points = _metrics(path) if text.lstrip().startswith("{") else _printed(text)
    losses: dict[int, float] = {}
    for iteration, loss in points:
        while losses and next(reversed(losses)) > iteration:
            losses.popitem()
        losses[iteration] = loss
    if not losses:
        raise ReportError(f"{path} has no training losses")
    return Curve(losses, _interval(list(losses)))


def _metrics(path: Path) -> list[Point]:
    records = [record for record in read_metrics(path) if record.get("kind") == "train"]
    return [(record["iteration"], math.nan if record["lm_loss"] is None else record["lm_loss"]) for record in records]


def _megatron(line: re.Match[str]) -> float:
    """The loss in a line; Megatron leaves it out when it is not a number."""
    found = re.search(r"\|\s*lm loss:\s*([^\s|]+)", line[2]) or re.search(r"\|\s*loss:\s*([^\s|]+)", line[2])
    return float(found[1]) if found else math.nan


def _second(line: re.Match[str]) -> float:
    return float(line[2])


_FORMATS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], float]], ...] = (
    (re.compile(r"\biteration\s+(\d+)\s*/\s*\d+\s*(\|.*)"), _megatron),
    (re.compile(r"\bstep (\d+) step_time .*? step loss (\S+)"), _second),
    (re.compile(r"\bsteps: (\d+) loss: (\S+) iter time"), _second),
)


def _printed(text: str) -> list[Point]:
    """The points of the first format that occurs: a log of Megatron's may hold lines of DeepSpeed's as well."""
    for pattern, loss in _FORMATS:
        lines = list(pattern.finditer(text))
        if lines:
            return [(int(line[1]), loss(line)) for line in lines]
    return []


def _interval(iterations: Sequence[int]) -> int:
    steps = [after - before for before, after in itertools.pairwise(iterations)]
    return statistics.mode(steps) if steps else 1


def compare(reference: Curve, candidate: Curve, threshold: float = THRESHOLD) -> Comparison:
    """The iterations that both runs logged, beside each other.

    Where one run logged more often, means over its lines stand against the lines of the other.

    Args:
        reference: the run that is right.
        candidate: the run that is judged.
        threshold: largest relative error that is allowed, 0.02 for 2 %.

    Raises:
        ReportError: the runs have no iteration in common, or log intervals of which neither divides the other.
    """
    interval = max(reference.interval, candidate.interval)
    for other in (reference.interval, candidate.interval):
        if interval % other:
            raise ReportError(
                f"one run logged every {reference.interval} iterations, the other every {candidate.interval}: "
                "a loss is a mean over such an interval, so one must divide the other"
            )
    one, two = _coarser(reference, interval), _coarser(candidate, interval)
    steps = tuple(Difference(iteration, one[iteration], two[iteration]) for iteration in one if iteration in two)
    if not steps:
        raise ReportError("the runs have no iteration in common")
    return Comparison(
        steps=steps,
        threshold=threshold,
        only_reference=len(one) - len(steps),
        only_candidate=len(two) - len(steps),
    )


def _coarser(curve: Curve, interval: int) -> dict[int, float]:
    """The losses as if they had been logged every `interval` iterations; incomplete intervals are left out."""
    if curve.interval == interval:
        return dict(curve.losses)
    result = {}
    for end in (iteration for iteration in curve.losses if iteration % interval == 0):
        parts = [curve.losses.get(end - back) for back in range(0, interval, curve.interval)]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            result[end] = statistics.fmean(known)
    return result


def report(comparison: Comparison, *, each: bool = False) -> Iterator[str]:
    """The comparison in words; with `each`, one line per iteration first."""
    if each:
        yield f"{'iteration':>10} {'reference':>14} {'candidate':>14} {'absolute':>12} {'relative':>10}"
        for step in comparison.steps:
            numbers = f"{step.reference:14.6e} {step.candidate:14.6e} {step.absolute:12.3e} {step.relative:10.4%}"
            yield f"{step.iteration:10d} {numbers}"
    steps, worst = comparison.steps, comparison.worst
    largest = max(steps, key=lambda step: step.absolute)
    without = f"{comparison.only_reference} and {comparison.only_candidate} without a counterpart"
    yield f"compared {len(steps)} losses, iterations {steps[0].iteration} to {steps[-1].iteration}; {without}"
    yield (
        f"absolute error: mean {comparison.mean_absolute:.3e}, max {largest.absolute:.3e} "
        f"at iteration {largest.iteration}"
    )
    yield (
        f"relative error: mean {comparison.mean_relative:.4%}, max {worst.relative:.4%} at iteration {worst.iteration}"
    )
    first = comparison.first_over
    if first is None:
        yield f"PASS: every loss is within {comparison.threshold:g} of the reference"
    else:
        yield (
            f"FAIL: the first error above {comparison.threshold:g} is {first.relative:.4%} at iteration "
            f"{first.iteration}: {first.candidate:.6e} instead of {first.reference:.6e}"
        )
