"""The picture of the loss."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.training.metrics import MetricsFile, evaluation_record, training_record
from megatron.training.plot import Curves, Segment, curves_of, plot_loss, round_perplexities
from megatron.training.report import ReportError
from tests.training.samples import EVALUATION, REPORT

ROOT = Path(__file__).resolve().parents[2]


def train(iteration: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "train", "iteration": iteration, "lm_loss": loss}


def evaluation(iteration: int, loss: float, split: str = "validation") -> dict[str, Any]:
    return {"kind": "evaluation", "iteration": iteration, "lm_loss": loss, "split": split}


def test_curves_by_segment_and_split() -> None:
    curves = curves_of(
        [
            {"kind": "start", "iteration": 0, "layout": "DP4"},
            train(10, 3.0),
            evaluation(10, 3.5),
            {"kind": "start", "iteration": 10, "layout": "TP4"},
            train(20, 2.0),
            evaluation(20, 2.5),
            evaluation(20, 2.4),  # evaluated again after training
            evaluation(20, 2.6, "test"),
            {"kind": "start", "iteration": 20},  # nothing logged yet
        ]
    )
    assert curves == Curves(
        [Segment("DP4", 0, [10], [3.0]), Segment("TP4", 10, [20], [2.0])], [(10, 3.5), (20, 2.4)], [(20, 2.6)]
    )


def test_a_loss_that_is_not_a_number_stays_a_gap() -> None:
    (segment,) = curves_of([train(10, 3.0), train(20, None)]).train
    assert segment.losses[0] == 3.0 and math.isnan(segment.losses[1])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (math.log(0.9), math.log(60), [1, 2, 5, 10, 20, 50]),
        (math.log(9), math.log(40000), [10, 30, 100, 300, 1000, 3000, 10000, 30000]),
        (math.log(11), math.log(31), [12, 15, 20, 25, 30]),
    ],
)
def test_perplexities_are_round(low: float, high: float, expected: list[float]) -> None:
    assert round_perplexities(low, high) == pytest.approx(expected)
    assert len(round_perplexities(0.0, 100.0)) <= 8


def a_run(path: Path) -> Path:
    """A run that is resumed with another layout, meets a NaN and is evaluated."""
    for start, layout in ((0, "TP2 x DP2"), (30, "DP4")):
        file = MetricsFile(path, start, {"layout": layout})
        for iteration in (start + 10, start + 20, start + 30):
            loss = math.nan if iteration == 40 else 10.0 - iteration / 10
            interval = replace(REPORT.interval, loss=loss)
            file.write(training_record(replace(REPORT, iteration=iteration, interval=interval)))
        file.write(evaluation_record(replace(EVALUATION, iteration=start + 30, loss=5.0)))
        file.close()
    return path


def test_the_picture_has_colours_for_all_curves(tmp_path: Path) -> None:
    image_module = pytest.importorskip("matplotlib.image")
    plot_loss(a_run(tmp_path / "metrics.jsonl"), tmp_path / "out" / "loss.png", title="a run")
    pixels = image_module.imread(tmp_path / "out" / "loss.png")[..., :3]
    for name, colour in {"first": "2563eb", "resumed": "93b4f4", "validation": "ea580c", "NaN": "dc2626"}.items():
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        near = (abs(pixels - wanted) < 0.02).all(axis=-1).sum()
        assert near > 20, name


def test_nothing_to_draw(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0, {}).close()
    with pytest.raises(ReportError, match="has no losses yet"):
        plot_loss(path, tmp_path / "loss.png")


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match="pip install matplotlib"):
        plot_loss(a_run(tmp_path / "metrics.jsonl"), tmp_path / "loss.png")


@pytest.mark.slow
def test_tool(tmp_path: Path) -> None:
    a_run(tmp_path / "metrics.jsonl")
    tool = [sys.executable, str(ROOT / "tools" / "plot_loss.py")]
    done = subprocess.run([*tool, str(tmp_path / "metrics.jsonl")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'loss.png'}\n"), done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    failed = subprocess.run([*tool, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (
        1,
        f"error: no metrics at {tmp_path / 'none'}; a run writes them with --log-json\n",
    )
