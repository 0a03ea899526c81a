"""SIMULATION of habana_frameworks.torch.core: step boundaries of lazy mode, counted and otherwise without effect."""

from __future__ import annotations

from habana_frameworks.torch import hpu
from habana_frameworks.torch.core import step_closure
from habana_frameworks.torch.core.step_closure import add_step_closure, iter_mark_step, mark_step

__all__ = ["add_step_closure", "hpu", "iter_mark_step", "mark_step", "step_closure"]
