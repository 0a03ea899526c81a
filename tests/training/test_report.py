"""Log lines."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from datetime import datetime

import pytest
import torch

from megatron.accelerators.base import MemoryStats
from megatron.training.report import Printers, dated, evaluation_lines, memory_line, summarise, training_line
from tests.training.samples import EVALUATION, REPORT, Result

LINE = (
    " iteration       20/     500 | consumed samples:          640 | consumed tokens:        81920 |"
    " elapsed time per iteration (ms): 512.6 | learning rate: 3.000E-04 | global batch size:    32 |"
    " lm loss: 2.500000E+00 | loss scale: 4096.0 | grad norm: 1.234 | number of skipped iterations:   0 |"
    " number of nan iterations:   0 | samples per second: 62.400 | tokens per gpu per second (tgs): 1996.800 |"
    " TFLOPs: 12.35 |"
)


def test_line_is_megatron_deepspeeds() -> None:
    assert training_line(REPORT) == LINE


def test_optional_fields_stand_where_megatron_has_them() -> None:
    full = replace(REPORT, params_norm=7.0, mfu=0.415, hfu=0.553, interval=replace(REPORT.interval, num_zeros=5))
    line = training_line(full, log_throughput=True)
    names = [field.split(":")[0].strip() for field in line.split("|")]
    assert names[3:5] == ["elapsed time per iteration (ms)", "throughput per GPU (TFLOP/s/GPU)"]
    assert names[8:12] == ["loss scale", "grad norm", "num zeros", "params norm"]
    assert line.endswith(" | MFU: 41.5% | HFU: 55.3% |")
    assert training_line(replace(REPORT, mfu=0.4, hfu=0.4)).endswith(" | MFU: 40.0% |")
    assert "grad norm" not in training_line(replace(REPORT, interval=replace(REPORT.interval, grad_norm=None)))


def test_the_expressions_of_log_parsers_match() -> None:
    line = training_line(REPORT, log_throughput=True)
    for pattern, value in {
        r"iteration\s+(\d+)/": "20",
        r"lm loss: ([\d.E+-]+)": "2.500000E+00",
        r"elapsed time per iteration \(ms\): ([\d.]+)": "512.6",
        r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+)": "12.3",
    }.items():
        found = re.search(pattern, line)
        assert found is not None and found.group(1) == value


def test_a_loss_that_is_not_a_number_is_printed_and_counted() -> None:
    interval = summarise([Result(loss=2.0), Result(loss=math.nan, grad_norm=math.inf)])
    line = training_line(replace(REPORT, interval=interval))
    assert "| lm loss: nan |" in line
    assert "| grad norm: inf |" in line
    assert "number of nan iterations:   1 |" in line


def test_skipped_steps_are_seen_and_do_not_enter_the_mean() -> None:
    interval = summarise([Result(loss=2.0), Result(loss=math.nan, skipped=True), Result(loss=9.0, skipped=True)])
    assert (interval.loss, interval.skipped, interval.nans, interval.steps) == (2.0, 2, 1, 3)
    assert "number of skipped iterations:   2 |" in training_line(replace(REPORT, interval=interval))
    all_skipped = summarise([Result(loss=4.0, skipped=True), Result(loss=6.0, skipped=True)])
    assert (all_skipped.loss, all_skipped.skipped) == (5.0, 2)


def test_numbers_may_still_be_on_the_device() -> None:
    interval = summarise([Result(loss=torch.tensor(2.0), grad_norm=torch.tensor(0.5), num_zeros=torch.tensor(3))])
    assert (interval.loss, interval.grad_norm, interval.num_zeros) == (2.0, 0.5, 3.0)


def test_evaluation_block() -> None:
    rule, text, again = evaluation_lines(EVALUATION).splitlines()
    assert text == " validation loss at iteration 20 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert rule == again == "-" * (len(text) + 1)
    test = evaluation_lines(replace(EVALUATION, split="test", draw=320))
    assert " validation loss at iteration 20 on 320-sample draw from test set | lm loss value" in test


def test_perplexity_of_extreme_losses() -> None:
    assert replace(EVALUATION, loss=1000.0).perplexity == math.exp(20)
    assert math.isnan(replace(EVALUATION, loss=math.nan).perplexity)


def test_memory_and_dates() -> None:
    mega = 1024 * 1024
    stats = MemoryStats(allocated=mega, max_allocated=2 * mega, reserved=3 * mega, max_reserved=7 * mega // 2)
    assert memory_line(3, 10, stats) == (
        "[Rank 3] (after 10 iterations) memory (MB) | allocated: 1.0 | max allocated: 2.0 | reserved: 3.0 |"
        " max reserved: 3.5"
    )
    assert dated("x", datetime(2026, 1, 2, 3, 4, 5)) == "[x] datetime: 2026-01-02 03:04:05 "


@pytest.mark.parametrize(("rank", "size", "printed"), [(0, 1, "abc"), (0, 3, "ac"), (1, 3, "c"), (2, 3, "bc")])
def test_printers(rank: int, size: int, printed: str) -> None:
    lines: list[str] = []
    printers = Printers.of(rank, size, lines.append)
    printers.rank0("a")
    printers.last_rank("b")
    printers.every("c")
    assert "".join(lines) == printed


def test_printers_write_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Printers.of(0, 1).rank0("a")
    assert capsys.readouterr().out == "a\n"
