"""What a loss or gradients that are not finite, or a loss far above the ones before, lead to."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from megatron.training.engine import StepResult

Policy = Literal["skip", "stop", "rollback"]


@dataclass(frozen=True, kw_only=True)
class AnomalyRules:
    """What is done about such a step.

    Attributes:
        on_nan: where something is not finite.
        on_spike: where the loss is a spike; None: nothing is a spike.
        spike_factor: a spike is above this number times the median of the last losses.
        spike_window: how many losses that are; before there are so many nothing is a spike.
    """

    on_nan: Policy = "skip"
    on_spike: Policy | None = None
    spike_factor: float = 2.0
    spike_window: int = 100


@dataclass(frozen=True)
class Anomaly:
    """A step that should not have been taken: a sentence about it, and what to do."""

    what: str
    policy: Policy


@dataclass(frozen=True)
class AnomalyWatch:
    """Knows the losses so far and judges the next one."""

    rules: AnomalyRules
    _losses: deque[float] = field(default_factory=deque)

    @property
    def highest_loss(self) -> float:
        """A higher loss (nats) is a spike; infinite while there is nothing to compare with."""
        rules = self.rules
        if rules.on_spike is None or len(self._losses) < rules.spike_window:
            return math.inf
        return rules.spike_factor * statistics.median(self._losses)

    def judge(self, result: StepResult) -> Anomaly | None:
        """What is wrong with a step, if anything; the loss of a good one is remembered."""
        rules = self.rules
        limit = self.highest_loss
        if not math.isfinite(result.loss):
            return Anomaly(f"the loss is {result.loss}", rules.on_nan)
        if rules.on_spike is not None and result.loss > limit:
            before = f"the median of the {rules.spike_window} before"
            return Anomaly(f"the loss of {result.loss:.6g} is above {rules.spike_factor:g} x {before}", rules.on_spike)
        # While the scale of float16 is above 1, gradients that overflow are how it finds its value.
        if result.skipped and result.loss_scale <= 1.0:
            return Anomaly(f"the gradient norm is {result.grad_norm}", rules.on_nan)
        self._losses.append(result.loss)
        if len(self._losses) > rules.spike_window:
            self._losses.popleft()
        return None

    def forget(self) -> None:
        """Begin anew, after going back in the run."""
        self._losses.clear()
