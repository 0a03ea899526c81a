"""SIMULATION of transformer_engine.recipe."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch


class Format(Enum):
    """Formats of the forward and the backward pass. Gaudi trains in E5M2 or in both (HYBRID)."""

    E5M2 = (torch.float8_e5m2, torch.float8_e5m2)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


LARGEST = {torch.float8_e5m2: 57344.0, torch.float8_e4m3fn: 240.0}
"""Gaudi 2's E4M3 ends at 240, where others' goes to 448."""


@dataclass(frozen=True)
class DelayedScaling:
    """How scales follow from measured values."""

    margin: int = 0
    interval: int = 1
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1
    amax_compute_algo: Literal["max", "most_recent"] = "most_recent"
    reduce_amax: bool = True

    def __post_init__(self) -> None:
        if self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"amax_compute_algo {self.amax_compute_algo!r}")
        if self.interval < 1 or self.amax_history_len < 1 or self.margin < 0:
            raise ValueError("interval and amax_history_len must be at least 1, margin at least 0")
