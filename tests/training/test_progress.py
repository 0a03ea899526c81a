"""The progress bar."""

from __future__ import annotations

import sys

import pytest

from megatron.training.progress import progress_bar
from megatron.training.report import Printers


def test_a_progress_bar_needs_a_wish_and_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_bar(True, 10) is None  # standard error is not a terminal here
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress_bar(False, 10) is None


def test_progress_bar_and_lines_do_not_mix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress_bar(True, 10, done=4)
    assert bar is not None
    bar.advance(loss=2.5)
    Printers.of(0, 1, bar.write).rank0("a line")
    bar.close()
    printed = capsys.readouterr()
    assert printed.out == "a line\n"
    assert "5/10" in printed.err and "loss=2.5000" in printed.err
