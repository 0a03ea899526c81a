"""SIMULATION of topologies.tools: the names that Gaudi's scripts use of Synapse's profiler."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path


class TraceType(Enum):
    """What is recorded."""

    TraceAll = 0


class SynapseProfilerApi:
    """Records between `profiler_start` and `profiler_stop`; needs HABANA_PROFILE from the start of the process."""

    def __init__(self) -> None:
        if "HABANA_PROFILE" not in os.environ:
            raise RuntimeError("HABANA_PROFILE is not set: the profiler was not initialised with the device")
        self._state = "new"

    def profiler_start(self, trace: TraceType, device: int) -> None:
        """Begin."""
        self._go("new", "running", trace, device)

    def profiler_stop(self, trace: TraceType, device: int) -> None:
        """End."""
        self._go("running", "stopped", trace, device)

    def profiler_get_trace_json(self, trace: TraceType, device: int) -> None:
        """Write the trace into the working directory."""
        self._go("stopped", "written", trace, device)
        Path("synapse_trace.json").write_text(json.dumps({"traceEvents": []}), encoding="utf-8")

    def _go(self, before: str, after: str, trace: TraceType, device: int) -> None:
        if not isinstance(trace, TraceType) or device != 0:
            raise ValueError(f"unknown trace {trace!r} or device {device!r}")
        if self._state != before:
            raise RuntimeError(f"the profiler is {self._state}, not {before}")
        self._state = after
