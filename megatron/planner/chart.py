"""Draws the memory of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.planner.memory import PARTS, Moment
from megatron.planner.plan import Plan
from megatron.planner.report import layout_text
from megatron.planner.request import Request
from megatron.training.report import ReportError

_COLORS = {
    "weights": "#1e3a8a",
    "master weights": "#2563eb",
    "optimizer": "#93b4f4",
    "gradients": "#0d9488",
    "activations": "#f59e0b",
    "logits and loss": "#ea580c",
    "working memory": "#94a3b8",
}
_INK, _GRID, _LIMIT = "#334155", "#e2e8f0", "#dc2626"
_GIB = 2**30
_MOST_BARS = 16
_GAP = 1
"""Empty rows between the ranks and the ways to recompute."""
_SMALLEST_LABEL = 0.045
"""Share of the axis below which a part is too narrow for its number."""


def draw(plan: Plan, request: Request, image: Path) -> None:
    """Draw the peak of every pipeline rank, by part, beside what the machine has.

    Args:
        plan: what to draw.
        request: what was asked for.
        image: where the picture goes; the ending says the format (png, svg, pdf).

    Raises:
        ReportError: matplotlib is missing, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError("--chart needs matplotlib: pip install matplotlib") from error
    bars, modes = _bars(plan), _modes(plan)
    everything = [*bars, *modes]
    rows = len(everything) + _GAP
    height = 1.75 + 0.4 * rows
    figure = Figure(figsize=(9.5, height), dpi=150, facecolor="white")
    axes = figure.subplots()
    right = max(plan.case.machine.usable, *(moment.total for _, moment in everything)) / _GIB * 1.08
    places = [*range(len(bars)), *(len(bars) + _GAP + at for at in range(len(modes)))]
    for place, (_, moment) in zip(places, everything, strict=True):
        _draw_bar(axes, place, moment, right)
    axes.text(0, len(bars) - 0.5 + _GAP, "fullest rank, if recomputed:", size=8, color=_INK, va="bottom")
    axes.set_yticks(places, [name for name, _ in everything], size=8.5, color=_INK)
    axes.set_ylim(rows - 0.45, -0.95)
    axes.set_xlim(0, right)
    _decorate(axes, plan, right)
    _title(figure, plan, request, height)
    try:
        figure.savefig(image)
    except (OSError, ValueError) as error:
        raise ReportError(f"--chart {image}: {error}") from error


def _title(figure: Any, plan: Plan, request: Request, height: float) -> None:
    name, world = request.values["preset"] or "model", plan.case.topology.world_size
    headline = f"{name} on {world} x {plan.case.machine.name}"
    figure.text(0.012, 1 - 0.16 / height, headline, size=12, color=_INK, weight="bold", va="top")
    figure.text(0.012, 1 - 0.45 / height, layout_text(plan.case), size=8.5, color=_INK, va="top")
    figure.subplots_adjust(left=0.105, right=0.985, top=1 - 0.72 / height, bottom=0.85 / height)


def _bars(plan: Plan) -> list[tuple[str, Moment]]:
    """Label and peak of each bar; of a long pipeline, evenly spaced ranks with the first and the last."""
    last = len(plan.memory) - 1
    if last == 0:
        return [("every rank", plan.memory[0].peak)]
    count = min(last + 1, _MOST_BARS)
    shown = sorted({round(at * last / (count - 1)) for at in range(count)})
    return [(f"stage {at}", plan.memory[at].peak) for at in shown]


def _modes(plan: Plan) -> list[tuple[str, Moment]]:
    names = {"none": "nothing", "selective": "attention", "mlp": "feed-forward", "full": "all layers"}
    return [(names[mode], found.peak) for mode, found in plan.by_recompute.items()]


def _draw_bar(axes: Any, row: int, moment: Moment, right: float) -> None:
    start = 0.0
    for part in PARTS:
        size = moment.parts.get(part, 0) / _GIB
        if size == 0:
            continue
        axes.barh(row, size, left=start, height=0.68, color=_COLORS[part], edgecolor="white", linewidth=0.6)
        if size > _SMALLEST_LABEL * right:
            dark = part in ("weights", "master weights", "gradients", "logits and loss")
            color = "white" if dark else _INK
            axes.text(start + size / 2, row, f"{size:.1f}", ha="center", va="center", size=7.5, color=color)
        start += size
    behind = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.8}
    place = start + 0.008 * right
    axes.text(place, row, f"{start:.1f}", va="center", size=8, color=_INK, weight="bold", bbox=behind, zorder=4)


def _decorate(axes: Any, plan: Plan, right: float) -> None:
    from matplotlib.patches import Patch

    limit = plan.case.machine.usable / _GIB
    axes.axvline(limit, color=_LIMIT, linewidth=1.4, zorder=3)
    axes.axvspan(limit, right, color=_LIMIT, alpha=0.06, zorder=0)
    axes.text(limit, -0.62, f"{limit:.1f} GiB usable ", ha="right", va="bottom", size=8, color=_LIMIT)
    axes.set_xlabel("GiB of a rank at the peak of a step", size=8.5, color=_INK)
    axes.tick_params(axis="x", labelsize=8, colors=_INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    drawn = [moment for _, moment in (*_bars(plan), *_modes(plan))]
    used = [part for part in PARTS if any(moment.parts.get(part) for moment in drawn)]
    axes.figure.legend(
        handles=[Patch(color=_COLORS[part], label=part) for part in used],
        loc="lower center",
        ncols=len(used),
        fontsize=8,
        frameon=False,
        labelcolor=_INK,
        handlelength=1.0,
        columnspacing=1.4,
    )
