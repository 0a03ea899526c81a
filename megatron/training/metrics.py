"""The log as data: a file with one JSON object per line.

Kinds of records (`kind`): `start` (a run or a resume, with what the caller says about it), `train` (one per log line)
and `evaluation`. A loss that is not a number is `null`, for JSON has no NaN; `nan_iterations` says so.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.training.report import Evaluation, ReportError, TrainingReport
from megatron.training.router_losses import RouterReport


def training_record(report: TrainingReport) -> dict[str, Any]:
    """The record of a log line. Times in milliseconds, rates per second."""
    return {
        "kind": "train",
        "iteration": report.iteration,
        "consumed_samples": report.consumed_samples,
        "consumed_tokens": report.consumed_tokens,
        "elapsed_ms_per_iteration": report.seconds_per_step * 1000.0,
        "learning_rate": report.learning_rate,
        "global_batch_size": report.global_batch_size,
        "lm_loss": report.interval.loss,
        "loss_scale": report.interval.loss_scale,
        "grad_norm": report.interval.grad_norm,
        "num_zeros": report.interval.num_zeros,
        **router_figures(report.interval.router),
        "params_norm": report.params_norm,
        "iterations": report.interval.steps,
        "skipped_iterations": report.interval.skipped,
        "nan_iterations": report.interval.nans,
        "samples_per_second": report.samples_per_second,
        "tokens_per_second_per_device": report.tokens_per_second_per_device,
        "tflops": report.tflops,
        "mfu": report.mfu,
        "hfu": report.hfu,
    }


def router_figures(router: RouterReport | None) -> dict[str, float | None]:
    """The figures of routers by name; none without experts."""
    if router is None:
        return {}
    return {
        "moe_loss": router.loss,
        "load_balancing_loss": router.balance,
        "z_loss": router.z,
        "dropped_share": router.dropped,
    }


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """The record of an evaluation."""
    return {
        "kind": "evaluation",
        "iteration": evaluation.iteration,
        "consumed_samples": evaluation.consumed_samples,
        "consumed_tokens": evaluation.consumed_tokens,
        "split": evaluation.split,
        "after_training": evaluation.draw is not None,
        "lm_loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a dying process left unfinished is left out.

    Raises:
        ReportError: the file does not exist, or a line before the last is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        raise ReportError(f"no metrics at {path}; a run writes them with --log-json") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ReportError(f"{path}, line {number} is not a JSON object: {error}") from None
        if not isinstance(record, dict):
            raise ReportError(f"{path}, line {number} is not a JSON object")
        records.append(record)
    return records


def without_abandoned(records: Iterable[Mapping[str, Any]], resumed_at: int) -> list[Mapping[str, Any]]:
    """The records that a run which goes on after iteration `resumed_at` builds upon.

    What was logged after that iteration was lost with the run that logged it, and will be trained again. A start at
    that iteration led to nothing that is kept.
    """
    return [
        record
        for record in records
        if record["iteration"] < resumed_at or (record["iteration"] == resumed_at and record["kind"] != "start")
    ]


class MetricsFile:
    """Appends records to a file, each one written out before the call returns.

    Args:
        path: the file; its directory is made.
        resumed_at: iteration of the checkpoint that the run goes on from, 0 for a new run. Records of later
            iterations are dropped from the file.
        about: what describes this run (layout, device ...), for the `start` record.
    """

    def __init__(self, path: Path, resumed_at: int, about: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _replace(path, without_abandoned(read_metrics(path), resumed_at))
        self._file = path.open("a", encoding="utf-8")
        self.write({"kind": "start", "iteration": resumed_at, **about})

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; the time (seconds since 1970) is added."""
        self._file.write(_line({**record, "time": round(time.time(), 3)}))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _replace(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Rewrite the file so that a crash leaves either the old or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for record in records)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
