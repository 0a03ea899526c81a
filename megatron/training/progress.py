"""A progress bar for a run that somebody watches on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from megatron.training.report import ReportError


class ProgressBar:
    """Iterations done, time left and loss, on standard error.

    Args:
        total: iterations of the whole run.
        done: iterations done before.

    Raises:
        ReportError: the package `tqdm` is missing.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ReportError("--progress-bar needs the package tqdm: pip install tqdm") from None
        self._bar: Any = tqdm(total=total, initial=done, unit="it", file=sys.stderr, dynamic_ncols=True)

    def advance(self, loss: float | None = None) -> None:
        """One iteration more; shows the loss if it is given."""
        if loss is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update()

    @property
    def write(self) -> Callable[[str], None]:
        """Prints a line to standard output without tearing the bar; for `Printers`."""
        return lambda text: self._bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def progress_bar(wanted: bool, total: int, done: int = 0) -> ProgressBar | None:
    """A bar if it is wanted and standard error is a terminal: in a log file a bar is noise."""
    return ProgressBar(total, done) if wanted and sys.stderr.isatty() else None
