"""Loss scaling for float16: a scale that halves on overflow and doubles after a run of clean steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """The state of the scale; `after` gives the next one.

    A static scale has `window` 0: it never changes, and steps that overflow are still skipped.
    The rule is Megatron's DynamicGradScaler: growth x2 after `window` clean steps, x0.5 after `hysteresis`
    overflows within a window, never below `minimum`.
    """

    value: float
    minimum: float = 1.0
    window: int = 0
    hysteresis: int = 1
    clean_steps: int = 0
    overflows_left: int = 1

    def after(self, overflow: bool) -> LossScale:
        """The scale for the next step."""
        if self.window == 0:
            return self
        if not overflow:
            return self._after_clean_step()
        left = self.overflows_left - 1
        value = max(self.value * 0.5, self.minimum) if left <= 0 else self.value
        return replace(self, value=value, clean_steps=0, overflows_left=left)

    def _after_clean_step(self) -> LossScale:
        if self.clean_steps + 1 < self.window:
            return replace(self, clean_steps=self.clean_steps + 1)
        return replace(self, value=self.value * 2.0, clean_steps=0, overflows_left=self.hysteresis)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)

    def resumed(self, saved: Mapping[str, Any]) -> LossScale:
        """This scale at the point that a saved one had reached; as it is where either of them never changes.

        Args:
            saved: what `state` gave, of a run whose rule may have been another one.
        """
        if not (self.window and saved["window"]):
            return self
        return replace(self, **{name: saved[name] for name in ("value", "clean_steps", "overflows_left")})

    @staticmethod
    def static(value: float) -> LossScale:
        """A scale that never changes; 1.0 for float32 and bfloat16."""
        return LossScale(value=value)

    @staticmethod
    def dynamic(initial: float, minimum: float, window: int, hysteresis: int) -> LossScale:
        """A scale that adapts to the overflows seen."""
        return LossScale(
            value=initial, minimum=minimum, window=window, hysteresis=hysteresis, overflows_left=hysteresis
        )
