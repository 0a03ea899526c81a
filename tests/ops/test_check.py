import json

import pytest
import torch

from megatron import accelerators
from megatron.ops import check, reference
from megatron.ops.registry import Implementation


def test_table_and_status(capsys: pytest.CaptureFixture[str]):
    assert check.main(["--device", "cpu", "--op", "rms_norm,relu", "--dtype", "float32", "--runs", "0"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["rms_norm", "lean"] in rows and ["relu", "reference"] in rows


def test_json(capsys: pytest.CaptureFixture[str]):
    assert check.main(["--device", "cpu", "--op", "relu", "--dtype", "float32", "--runs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert row["passed"]
    assert row["speedup"] == 1.0
    assert row["milliseconds"] > 0


@pytest.mark.parametrize(
    "wrong", [["--op", "softmax"], ["--dtype", "float8"], ["--device", "tpu"]], ids=["op", "dtype", "device"]
)
def test_unknown_names_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        check.main(wrong)
    assert exit_.value.code == 2
    assert wrong[1] in capsys.readouterr().err


@pytest.mark.parametrize("defect", [lambda x: x * 1.01, lambda x: x * float("nan")], ids=["inexact", "nan"])
def test_wrong_kernel_is_found(defect):
    wrong = Implementation(op="squared_relu", name="wrong", function=lambda x: defect(reference.squared_relu(x)))
    error = check.measure_error(wrong, torch.float32, torch.device("cpu"))
    row = check.Row(
        op="squared_relu",
        implementation="wrong",
        dtype="float32",
        error=error,
        tolerance=wrong.tolerance[torch.float32],
        milliseconds=None,
        speedup=None,
    )
    assert not row.passed
    assert "ERROR TOO LARGE" in check.table([row])


def test_wrong_gradient_is_found():
    def detached(x: torch.Tensor) -> torch.Tensor:
        return reference.squared_relu(x).detach() + 0.0 * x

    wrong = Implementation(op="squared_relu", name="wrong", function=detached)
    assert check.measure_error(wrong, torch.float32, torch.device("cpu")) > 0.5


def test_unavailable_implementations_are_listed_with_reasons():
    lines = check.unavailable(accelerators.load("cuda"), ["attention"])
    for line in lines:
        name, reason = line.split(": ", 1)
        assert name.startswith("attention=")
        assert reason
