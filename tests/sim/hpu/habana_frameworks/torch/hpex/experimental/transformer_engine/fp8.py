"""SIMULATION of transformer_engine.fp8: when to compute in 8 bits, and when to measure."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from habana_frameworks.torch.hpex.experimental.transformer_engine.recipe import DelayedScaling


@dataclass
class _State:
    enabled: bool = False
    recipe: DelayedScaling = DelayedScaling()  # noqa: RUF009 - frozen
    group: dist.ProcessGroup | None = None
    force_measurement: bool | None = None
    manual: bool = False
    manual_value: bool = True


STATE = _State()


def is_fp8_enabled() -> bool:
    """Whether linear layers compute in 8 bits now."""
    return STATE.enabled


def set_measurement_mode(manual: bool, manual_value: bool = True) -> None:
    """Measure when told to (`manual`), or once per `interval` of the recipe."""
    STATE.manual, STATE.manual_value = manual, manual_value


def measures(run: int) -> bool:
    """Whether forward pass number `run` (from 0) of a layer measures."""
    if STATE.force_measurement is not None:
        return STATE.force_measurement
    return STATE.manual_value if STATE.manual else run % STATE.recipe.interval == 0


class fp8_autocast(contextlib.ContextDecorator):
    """Context manager and decorator: compute linear layers in 8 bits, with a recipe and a group to reduce over."""

    def __init__(
        self,
        enabled: bool = False,
        force_measurement: bool | None = None,
        fp8_recipe: DelayedScaling | None = None,
        fp8_group: dist.ProcessGroup | None = None,
    ) -> None:
        if fp8_recipe is not None and not isinstance(fp8_recipe, DelayedScaling):
            raise TypeError(f"fp8_recipe must be a DelayedScaling, not {type(fp8_recipe).__name__}")
        self._wanted = (enabled, fp8_recipe or DelayedScaling(), fp8_group, force_measurement)
        self._before: list[tuple[Any, ...]] = []

    def __enter__(self) -> None:
        self._before.append((STATE.enabled, STATE.recipe, STATE.group, STATE.force_measurement))
        STATE.enabled, STATE.recipe, STATE.group, STATE.force_measurement = self._wanted

    def __exit__(self, *_: object) -> None:
        STATE.enabled, STATE.recipe, STATE.group, STATE.force_measurement = self._before.pop()
