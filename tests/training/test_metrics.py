"""The log as data."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.training.metrics import MetricsFile, evaluation_record, read_metrics, training_record, without_abandoned
from megatron.training.report import ReportError
from tests.training.samples import EVALUATION, REPORT


def train_record(iteration: int, loss: float = 1.0) -> dict[str, Any]:
    interval = replace(REPORT.interval, loss=loss)
    return training_record(replace(REPORT, iteration=iteration, interval=interval))


def test_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0, {"layout": "TP2 x DP4"})
    file.write(train_record(10, loss=math.nan))
    file.write(evaluation_record(EVALUATION))
    start, train, evaluation = read_metrics(path)  # written out before the file is closed
    file.close()
    assert (start["kind"], start["iteration"], start["layout"]) == ("start", 0, "TP2 x DP4")
    assert train["lm_loss"] is None and train["grad_norm"] == 1.2345 and train["tflops"] == 12.346
    assert (evaluation["split"], evaluation["lm_loss"]) == ("validation", 2.0)
    assert all(record["time"] > 0 for record in (start, train, evaluation))


def test_a_resume_drops_what_an_abandoned_run_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, {})
    for iteration in (10, 20, 30):
        file.write(train_record(iteration))
    file.close()
    with path.open("a") as torn:
        torn.write('{"kind": "train", "iterat')
    for _ in range(2):  # the second resume finds a start at 20 that led to nothing
        MetricsFile(path, 20, {}).close()
    assert [(r["kind"], r["iteration"]) for r in read_metrics(path)] == [
        ("start", 0),
        ("train", 10),
        ("train", 20),
        ("start", 20),
    ]
    assert list(tmp_path.iterdir()) == [path]
    assert without_abandoned(read_metrics(path), 0) == []


def test_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no metrics at"):
        read_metrics(tmp_path / "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"kind"\n{}\n')
    with pytest.raises(ReportError, match="line 1 is not a JSON object"):
        read_metrics(broken)
    broken.write_text("3\n")
    with pytest.raises(ReportError, match="line 1 is not a JSON object"):
        read_metrics(broken)
