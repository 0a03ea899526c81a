"""tools/verify_checkpoint.py: its table, what it finds, its exit codes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron.checkpoint import TrainingState, save
from tests.support import load_tool

TOOL = Path(__file__).resolve().parents[2] / "tools" / "verify_checkpoint.py"


@pytest.fixture
def tool() -> ModuleType:
    return load_tool(TOOL.name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    good = {"model.a": torch.tensor([[1.0, -3.0]]), "optimizer.step.a": torch.tensor(2.0), "n": torch.tensor([5])}
    bad = {
        **good,
        "model.a": torch.tensor([[float("nan"), float("-inf")]]),
        "model.f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    for iteration, tensors in ((1, good), (2, bad)):
        save(tmp_path, iteration, TrainingState(tensors=tensors, progress={}, run={}), log=lambda _: None)
    return tmp_path


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["verify_checkpoint.py", *map(str, arguments)])
    try:
        return int(tool.main())
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_good_checkpoint(
    tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ((root, "--iteration", "1"), (root / "iter_0000001",)):
        assert run(tool, monkeypatch, *arguments) == 0
        out = capsys.readouterr().out
        assert "3 tensors" in out
        assert "        0         0  3.0000e+00  float32   1x2                  model.a" in out
        assert "scalar               optimizer.step.a" in out
        assert out.rstrip().endswith(": good")


def test_values_that_are_not_finite(
    tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tool, monkeypatch, root) == 1
    out = capsys.readouterr().out
    assert "DAMAGED: model.a: 1 NaN and 1 infinite values" in out
    assert "float8_e4m3fn" in out
    assert out.count("DAMAGED") == 1


def test_damage(
    tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = root / "iter_0000001" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert run(tool, monkeypatch, root, "--iteration", 1) == 1
    assert "DAMAGED: __0_0.distcp: contents have changed" in capsys.readouterr().out
    data.unlink()
    assert run(tool, monkeypatch, root, "--iteration", 1) == 1
    assert "__0_0.distcp: No such file" in capsys.readouterr().out
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    assert run(tool, monkeypatch, root) == 1
    assert "no checkpoint of iteration 7; there are: 1, 2" in capsys.readouterr().out


def test_usage(
    tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tool, monkeypatch, root, "--iteration", "5") == 2
    assert run(tool, monkeypatch, root / "nowhere") == 2
    assert "holds no checkpoint" in capsys.readouterr().err
