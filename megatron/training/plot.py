"""Draws the loss of a run from its metrics file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.training.metrics import read_metrics
from megatron.training.report import ReportError

_TRAIN = ("#2563eb", "#93b4f4", "#1e3a8a")
_VALIDATION = "#ea580c"
_TEST = "#16a34a"
_INK = "#334155"
_GRID = "#e2e8f0"
_WRONG = "#dc2626"
_MAX_MARKERS = 40  # more points than that and markers hide the curve
_TICKS = 8


@dataclass(frozen=True)
class Segment:
    """The part of a run between one start and the next.

    Attributes:
        label: what the run said about itself when it started, such as its layout.
        start: iteration it went on from.
        iterations: iterations with a log line.
        losses: mean loss (nats) of each line; NaN where it was not a number.
    """

    label: str
    start: int
    iterations: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Curves:
    """What there is to draw: the training loss by segment, and points (iteration, loss) per evaluated split."""

    train: list[Segment]
    validation: list[tuple[int, float]]
    test: list[tuple[int, float]]


def curves_of(records: Iterable[Mapping[str, Any]]) -> Curves:
    """The curves of the records of a metrics file."""
    segments: list[Segment] = []
    evaluations: dict[str, dict[int, float]] = {"validation": {}, "test": {}}
    for record in records:
        iteration = int(record["iteration"])
        if record["kind"] == "start":
            segments.append(Segment(str(record.get("layout", "")), iteration, [], []))
            continue
        loss = math.nan if record["lm_loss"] is None else float(record["lm_loss"])
        if record["kind"] == "evaluation":
            evaluations[record["split"]][iteration] = loss
            continue
        if not segments:
            segments.append(Segment("", 0, [], []))
        segments[-1].iterations.append(iteration)
        segments[-1].losses.append(loss)
    return Curves(
        [segment for segment in segments if segment.iterations],
        sorted(evaluations["validation"].items()),
        sorted(evaluations["test"].items()),
    )


def plot_loss(metrics: Path, image: Path, *, title: str = "") -> None:
    """Draw training and validation loss over iterations; resumed parts alternate in shade and name their layout.

    Args:
        metrics: the file that `--log-json` names.
        image: where the picture goes; the ending says the format (png, svg, pdf).
        title: above the picture.

    Raises:
        ReportError: the package `matplotlib` is missing, or there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("drawing the loss needs the package matplotlib: pip install matplotlib") from None
    curves = curves_of(read_metrics(metrics))
    if not curves.train and not curves.validation and not curves.test:
        raise ReportError(f"{metrics} has no losses yet")
    figure = Figure(figsize=(9.0, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, curves)
    _decorate(axes, title, curves)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


def _draw(axes: Any, curves: Curves) -> None:
    """The curves themselves. A resume with another layout gets another shade; every resume gets a dotted line."""
    shade = -1
    for before, segment in zip((None, *curves.train), curves.train, strict=False):
        points = list(zip(segment.iterations, segment.losses, strict=True))
        changed = before is None or before.label != segment.label
        shade += changed
        if before is not None:
            axes.axvline(segment.start, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.6, zorder=1)
            points.insert(0, (before.iterations[-1], before.losses[-1]))
        label = _name(segment) if changed else None
        axes.plot(*zip(*points, strict=True), color=_TRAIN[shade % len(_TRAIN)], linewidth=1.6, label=label)
    for name, evaluated, colour in (("validation", curves.validation, _VALIDATION), ("test", curves.test, _TEST)):
        if evaluated:
            marker = "o" if len(evaluated) <= _MAX_MARKERS else None
            width = 1.4 if name == "validation" else 0
            x, y = zip(*evaluated, strict=True)
            axes.plot(x, y, color=colour, label=name, zorder=3, marker=marker, markersize=4.5, linewidth=width)
    _mark_losses_that_are_not_numbers(axes, curves.train)


def _name(segment: Segment) -> str:
    """The entry of the legend."""
    details = [segment.label] if segment.label else []
    details += [f"from iteration {segment.start}"] if segment.start else []
    return "training" + (f" ({', '.join(details)})" if details else "")


def _mark_losses_that_are_not_numbers(axes: Any, segments: list[Segment]) -> None:
    """A gap in a curve is easily missed; a red cross at the bottom is not."""
    lost = [
        iteration
        for segment in segments
        for iteration, loss in zip(segment.iterations, segment.losses, strict=True)
        if not math.isfinite(loss)
    ]
    if lost:
        style = {"linestyle": "none", "marker": "x", "color": _WRONG, "label": "loss is not a number"}
        axes.plot(lost, [0.02] * len(lost), transform=axes.get_xaxis_transform(), **style)


def _decorate(axes: Any, title: str, curves: Curves) -> None:
    """Axes, grid, legend."""
    axes.set_xlabel("iteration", color=_INK)
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.set_title(title, loc="left", color=_INK, fontweight="bold", fontsize=12)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02, y=0.08)
    _add_perplexity(axes)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", labelcolor=_INK, fontsize=9)


def _add_perplexity(axes: Any) -> None:
    """A second axis on the right: the exponential of the loss at round values."""
    low, high = axes.get_ylim()
    right = axes.twinx()
    right.set_ylim(low, high)
    ticks = round_perplexities(low, high)
    right.set_yticks(
        [math.log(tick) for tick in ticks], [f"{tick:g}" if tick < 1e5 else f"{tick:.0e}" for tick in ticks]
    )
    right.set_ylabel("perplexity", color=_INK)
    right.tick_params(colors=_INK, length=0)
    for spine in right.spines.values():
        spine.set_visible(False)


def round_perplexities(low: float, high: float) -> list[float]:
    """Perplexities to label between two losses (nats): 1, 2, 5, 10 ..., or fewer per decade if those are too many."""
    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        inside = [tick for tick in ticks if low <= math.log(tick) <= high]
        if len(inside) <= _TICKS:
            return inside
    return inside[:: math.ceil(len(inside) / _TICKS)]
