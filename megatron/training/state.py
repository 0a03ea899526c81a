"""How far a run is: what a checkpoint keeps besides tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.training.engine import StepResult
from megatron.training.lr import SchedulePosition


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Position in the run; the same on every rank and for every layout.

    Attributes:
        iteration: optimizer steps done, skipped ones included.
        samples: training samples consumed: the position in the data order.
        tokens: training tokens consumed.
        valid_samples: validation samples consumed.
        skipped: steps whose gradients were not finite.
        nans: steps whose loss was not finite.
        schedule: position of the learning-rate schedule, which skipped steps do not advance.
    """

    iteration: int = 0
    samples: int = 0
    tokens: int = 0
    valid_samples: int = 0
    skipped: int = 0
    nans: int = 0
    schedule: SchedulePosition = field(default_factory=SchedulePosition)

    def after(self, result: StepResult, samples: int, tokens: int) -> TrainState:
        """The state after a step over `samples` samples with `tokens` tokens."""
        moved = self.schedule if result.skipped else self.schedule.after(samples, tokens)
        return replace(
            self.after_unused(samples, tokens),
            skipped=self.skipped + result.skipped,
            nans=self.nans + (not math.isfinite(result.loss)),
            schedule=moved,
        )

    def after_unused(self, samples: int, tokens: int) -> TrainState:
        """The state after an iteration whose data was read but not trained on."""
        return replace(self, iteration=self.iteration + 1, samples=self.samples + samples, tokens=self.tokens + tokens)

    def to_progress(self) -> dict[str, Any]:
        """JSON, under the names Megatron's checkpoints use. The schedule is stored beside it."""
        return {
            "iteration": self.iteration,
            "consumed_train_samples": self.samples,
            "consumed_train_tokens": self.tokens,
            "consumed_valid_samples": self.valid_samples,
            "skipped_iterations": self.skipped,
            "nan_iterations": self.nans,
        }

    @staticmethod
    def from_progress(progress: Mapping[str, Any], schedule: SchedulePosition) -> TrainState:
        """What `to_progress` gave, at a position of the schedule."""
        return TrainState(
            iteration=progress["iteration"],
            samples=progress["consumed_train_samples"],
            tokens=progress["consumed_train_tokens"],
            valid_samples=progress["consumed_valid_samples"],
            skipped=progress["skipped_iterations"],
            nans=progress["nan_iterations"],
            schedule=schedule,
        )
