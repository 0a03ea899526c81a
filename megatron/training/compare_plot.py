"""The picture of a comparison: both loss curves, and the relative error below them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron.training.compare import Comparison
from megatron.training.report import ReportError

_REFERENCE, _CANDIDATE, _ERROR = "#64748b", "#2563eb", "#16a34a"
_INK, _GRID, _WRONG = "#334155", "#e2e8f0", "#dc2626"


def plot_comparison(comparison: Comparison, image: Path, *, names: tuple[str, str], title: str = "") -> None:
    """Draw the losses of both runs in one panel and their relative error in another.

    Args:
        comparison: the two runs.
        image: where the picture goes; the ending says the format (png, svg, pdf).
        names: what the reference and the candidate are called.
        title: above the picture.

    Raises:
        ReportError: the package `matplotlib` is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("drawing a comparison needs the package matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9.0, 7.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    iterations = [step.iteration for step in comparison.steps]
    reference = [step.reference for step in comparison.steps]
    # The candidate is thin and drawn last, so that the reference still shows where the two agree.
    above.plot(iterations, reference, color=_REFERENCE, linewidth=3.0, alpha=0.6, label=names[0])
    above.plot(iterations, [step.candidate for step in comparison.steps], color=_CANDIDATE, lw=1.2, label=names[1])
    above.set_ylabel("loss (nats per token)", color=_INK)
    above.set_title(title, loc="left", color=_INK, fontweight="bold", fontsize=12)
    _draw_error(below, comparison, iterations)
    below.set_xlabel("iteration", color=_INK)
    for axes in (above, below):
        _decorate(axes)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


def _draw_error(axes: Any, comparison: Comparison, iterations: list[int]) -> None:
    """Errors in percent, their mean and the threshold; iterations without a number are crosses on top."""
    errors = [100.0 * step.relative for step in comparison.steps]
    finite = [error if math.isfinite(error) else math.nan for error in errors]
    axes.plot(iterations, finite, color=_ERROR, linewidth=1.2, label="relative error")
    mean = 100.0 * comparison.mean_relative
    if math.isfinite(mean):
        axes.axhline(mean, color=_INK, linewidth=1.0, linestyle=":", label=f"mean {mean:.3g} %")
    limit = 100.0 * comparison.threshold
    axes.axhline(limit, color=_WRONG, linewidth=1.0, linestyle="--", label=f"threshold {limit:g} %")
    lost = [iteration for iteration, error in zip(iterations, errors, strict=True) if not math.isfinite(error)]
    if lost:
        style = {"linestyle": "none", "marker": "x", "color": _WRONG, "label": "loss is not a number"}
        axes.plot(lost, [0.95] * len(lost), transform=axes.get_xaxis_transform(), **style)
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("relative error (%)", color=_INK)


def _decorate(axes: Any) -> None:
    """Grid, frame and legend."""
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", labelcolor=_INK, fontsize=9)
