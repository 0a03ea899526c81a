"""Losses are found in the logs of every trainer, and two runs are judged by each of their iterations."""

from __future__ import annotations

import json
import math

import pytest

from megatron.training.compare import Curve, Difference, compare, read_curve, report
from megatron.training.compare_plot import plot_comparison
from megatron.training.report import Interval, ReportError, TrainingReport, training_line
from tools.compare_loss import main

_EXACT = 1e-12
"""Means of a few float64 numbers."""

_MEGATRON_LM = (
    " [2024-05-01 10:00:00] iteration       10/    1000 | consumed samples:          160 | elapsed time per iteration "
    "(ms): 512.3 | throughput per GPU (TFLOP/s/GPU): 301.2 | learning rate: 1.000000E-05 | global batch size:    16 | "
    "lm loss: 1.093847E+01 | loss scale: 1.0 | grad norm: 2.184 | number of skipped iterations:   0 | number of nan "
    "iterations:   0 |\n"
)
_ASCENDSPEED = (  # as its README shows it: a misspelt field, and the line wrapped
    " iteration  3/50000 | consumed samples: 768 | consumed tokens:  1572864 | elapsed time per iteration (ms):  "
    "33818.0 | learning rate:    1.406E-07 | gloabl batch size:  256 | lm loss:  1.200820E+01 | loss scale:  1.0 | "
    "grad norm:    9.216 | actual seqlen:  2048 | number of skipped\niterations: 0 | number of nan iterations:   0 | "
    "samples per second: 7.570 | TFLOPs: 107.09 |\ntime (ms)\n"
)
_GAUDI = (
    "10.0.0.7: steps: 20 loss: 10.1234 iter time (s): 1.5 samples/sec: 170.1\n"
    "10.0.0.7:  iteration       20/  937500 | consumed samples:         5120 | consumed tokens:     41943040 | "
    "elapsed time per iteration (ms): 1500.1 | learning rate: 7.500E-07 | global batch size:   256 | "
    "loss: 1.100000E+01 | lm loss: 1.012345E+01 | moe loss: 2.0E-02 | grad norm: 3.100 | actual seqlen:  8192 | "
    "number of skipped iterations:   0 | TFLOPs: 400.00 |\n"
)
_NEURON = "step 7 step_time 3.1s throughput 10.2 seq/s step loss 9.75 grad norm 1.2\n"
_DEEPSPEED = "[INFO] steps: 5 loss: 8.5000 iter time (s): 0.201 samples/sec: 39.7\n"


def _ours(iteration: int, loss: float) -> str:
    interval = Interval(steps=1, loss=loss, grad_norm=1.0, loss_scale=None, num_zeros=None, skipped=0, nans=0)
    return training_line(
        TrainingReport(
            iteration=iteration,
            train_iterations=100,
            consumed_samples=iteration,
            consumed_tokens=iteration,
            seconds_per_step=0.1,
            learning_rate=1e-3,
            global_batch_size=1,
            interval=interval,
            samples_per_second=10.0,
            tokens_per_second_per_device=10.0,
            tflops=1.0,
        )
    )


def _file(folder, text, name="log"):
    path = folder / name
    path.write_text(text)
    return path


def _log(losses, start=1, every=1) -> str:
    return "".join(_ours(start + every * number, loss) + "\n" for number, loss in enumerate(losses))


@pytest.mark.parametrize(
    ("text", "losses"),
    [
        (_MEGATRON_LM, {10: 10.93847}),
        (_ASCENDSPEED, {3: 12.0082}),
        (_GAUDI, {20: 10.12345}),
        (_NEURON, {7: 9.75}),
        (_DEEPSPEED, {5: 8.5}),
        (_ours(4, 2.5), {4: 2.5}),
        ("[default7]:" + _ours(4, 2.5) + "\nvalidation loss at iteration 4 | lm loss value: 9.9E+00 |\n", {4: 2.5}),
    ],
)
def test_losses_are_found_in_every_log(tmp_path, text, losses):
    assert read_curve(_file(tmp_path, text)).losses == losses


def test_losses_are_found_in_our_metrics(tmp_path):
    records = [{"kind": "start", "iteration": 0}]
    records += [{"kind": "train", "iteration": n, "lm_loss": loss} for n, loss in ((2, 3.0), (4, None))]
    records += [{"kind": "evaluation", "iteration": 4, "split": "validation", "lm_loss": 9.0}]
    curve = read_curve(_file(tmp_path, "".join(json.dumps(record) + "\n" for record in records)))
    assert curve.losses[2] == 3.0 and math.isnan(curve.losses[4]) and curve.interval == 2


def test_a_line_without_a_loss_had_none_that_is_a_number(tmp_path):
    line = _ours(1, 2.0).replace(" lm loss: 2.000000E+00 |", "")
    assert "lm loss" not in line and math.isnan(read_curve(_file(tmp_path, line)).losses[1])


def test_what_was_trained_again_counts_once(tmp_path):
    curve = read_curve(_file(tmp_path, _log([5.0, 4.0, 3.0, 2.5]) + _log([4.5, 3.5], start=2)))
    assert curve.losses == {1: 5.0, 2: 4.5, 3: 3.5}


@pytest.mark.parametrize("text", ["", "nothing here\n", '{"kind": "start", "iteration": 0}\n'])
def test_a_file_without_losses_is_named(tmp_path, text):
    with pytest.raises(ReportError, match="log has no training losses"):
        read_curve(_file(tmp_path, text))


@pytest.mark.parametrize(
    ("reference", "candidate", "absolute", "relative"),
    [
        (2.0, 2.0, 0.0, 0.0),
        (2.0, 2.5, 0.5, 0.25),
        (2.0, 1.5, 0.5, 0.25),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 1.0, math.inf),
        (2.0, math.nan, math.inf, math.inf),
        (math.nan, math.nan, math.inf, math.inf),
        (math.inf, math.inf, math.inf, math.inf),
    ],
)
def test_errors_of_one_iteration(reference, candidate, absolute, relative):
    step = Difference(1, reference, candidate)
    assert (step.absolute, step.relative) == (absolute, relative)


def test_comparison_finds_the_first_and_the_worst_error():
    one = Curve({1: 4.0, 2: 4.0, 3: 4.0, 4: 4.0, 5: 4.0}, 1)
    two = Curve({1: 4.0, 2: 4.04, 3: 4.12, 4: 4.4, 9: 1.0}, 1)
    result = compare(one, two)
    assert not result.passed and result.first_over.iteration == 3 and result.worst.iteration == 4
    assert result.mean_relative == pytest.approx((0.01 + 0.03 + 0.1) / 4, abs=_EXACT)
    assert result.mean_absolute == pytest.approx(0.56 / 4, abs=_EXACT)
    assert (result.only_reference, result.only_candidate) == (1, 1)
    assert compare(one, two, 0.11).passed


def test_a_run_that_logs_more_often_is_averaged():
    fine = Curve({n: float(n) for n in range(1, 9)}, 1)
    coarse = Curve({4: 2.5, 8: 6.5}, 4)
    assert [step.absolute for step in compare(coarse, fine).steps] == [0.0, 0.0]
    resumed = Curve({n: float(n) for n in range(3, 9)}, 1)
    assert [step.iteration for step in compare(coarse, resumed).steps] == [8], "iteration 4 lacks 1 and 2"


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (Curve({2: 1.0, 4: 1.0}, 2), Curve({3: 1.0, 6: 1.0}, 3), "every 2 iterations, the other every 3"),
        (Curve({1: 1.0}, 1), Curve({2: 1.0}, 1), "no iteration in common"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(one, two, message):
    with pytest.raises(ReportError, match=message):
        compare(one, two)


def test_report_says_everything():
    result = compare(Curve({1: 4.0, 2: 4.0}, 1), Curve({1: 4.0, 2: 5.0}, 1))
    lines = list(report(result, each=True))
    assert len(lines) == 3 + 4 and "25.0000%" in lines[2]
    assert (
        lines[-1] == "FAIL: the first error above 0.02 is 25.0000% at iteration 2: 5.000000e+00 instead of 4.000000e+00"
    )
    assert list(report(compare(Curve({1: 4.0}, 1), Curve({1: 4.0}, 1))))[-1].startswith("PASS")


def test_tool_compares_draws_and_judges(tmp_path, capsys):
    same = _file(tmp_path, _log([4.0, 3.0, 2.0]), "same.log")
    near = _file(tmp_path, _log([4.0, 3.03, 2.0]), "near.log")
    image = tmp_path / "new" / "picture.png"
    assert main([str(same), str(near), "--output", str(image), "--title", "NPU and GPU"]) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    assert str(image) in capsys.readouterr().out
    assert main([str(same), str(near), "--threshold", "0.5%"]) == 1
    assert "at iteration 2" in capsys.readouterr().out
    assert main([str(same), str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_losses_that_are_not_numbers_can_be_drawn(tmp_path):
    result = compare(Curve({1: 4.0, 2: 3.0}, 1), Curve({1: 4.0, 2: math.nan}, 1))
    plot_comparison(result, tmp_path / "nan.png", names=("a", "b"))
    assert (tmp_path / "nan.png").stat().st_size > 1000
