"""SIMULATION of the toolkit's log: one entry of three lines for every place in the code."""

from __future__ import annotations

import json
import linecache
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from tests.sim import redirect
from tests.sim.redirect import Kind

_OWN = {redirect.__file__, str(Path(__file__)), str(Path(__file__).with_name("_attention.py"))}


class Log:
    """Writes each place once, as it is met; with no path, nothing.

    Args:
        path: of the log; the summary lies beside it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._places: set[tuple[str, int, str]] = set()
        self._kinds: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._names: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._process = os.getpid()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    @classmethod
    def from_environment(cls) -> Log:
        """The log that the toolkit's variables ask for."""
        if "GPU_MIGRATION_LOG_LEVEL" not in os.environ:
            return cls(None)
        folder = Path(os.environ.get("HABANA_LOGS", ".")) / "gpu_migration_logs"
        return cls(folder / f"gpu_migration_{os.getpid()}.log")

    def watch(self, names: Iterable[str]) -> None:
        """Functions whose calls make up the coverage."""
        self._names = tuple(sorted(names))
        self._summarise()

    def seen(self, kind: Kind, name: str, old: str, new: str) -> None:
        """A call was redirected."""
        if self._path is None or os.getpid() != self._process:  # workers that read data are forked from the trainer
            return
        file, line = _caller()
        with self._lock:  # backward passes call from threads of their own
            self._calls[name] += 1
            if (file, line, name) in self._places:
                return
            self._places.add((file, line, name))
            self._kinds[kind] += 1
            now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            context = linecache.getline(file, line).strip()
            with self._path.open("a") as log:
                log.write(f"[{now}] {file}:{line}\n    [context]: {context}\n    [hpu_{kind}]: {old} --> {new}\n\n")
            self._summarise()

    def _summarise(self) -> None:
        """The summary so far: training programs may end without any clean-up."""
        if self._path is None:
            return
        called = sorted(self._calls)
        summary = {
            "places": dict(self._kinds),
            "called": called,
            "never_called": sorted(set(self._names) - set(called)),
        }
        self._path.with_suffix(".json").write_text(json.dumps(summary, indent=1))


def _caller() -> tuple[str, int]:
    """File and line of the code that made the call."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename in _OWN and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
