"""What a training engine does; the two engines are `native` (PyTorch's own distributed stack) and `deepspeed`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.checkpoint import Loaded, Saver
from megatron.checkpoint.files import nothing
from megatron.data.batch import Batch
from megatron.training.router_losses import RouterReport


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean loss per unmasked token (nats) over the global batch."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    skipped: bool = False
    """The gradients were not finite, or the loss too high, so the weights were left alone."""
    loss_scale: float = 1.0
    num_zeros: int | None = None
    """Zeros among all gradient elements; None unless asked for."""
    router: RouterReport | None = None
    """What the routers did; None without experts."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The values of the schedules at this step."""

    lr: float
    weight_decay: float
    highest_loss: float = math.inf
    """With a higher loss the weights are left alone. Engines that cannot tell before they change them ignore it."""


@dataclass(frozen=True, kw_only=True)
class SaveTarget:
    """Where checkpoints go and what is in them."""

    saver: Saver
    optimizer: bool = True
    """Whether the optimizer state is saved."""
    heal: bool = False
    """Whether copies of a parameter that differ between ranks are made equal first."""


@dataclass(frozen=True, kw_only=True)
class LoadSource:
    """What to continue from; see `megatron.checkpoint.load`."""

    root: str
    iteration: int | None = None
    verify: bool = True
    fallback: bool = True
    progress: Callable[[], None] = nothing


class Engine(Protocol):
    """Owns the model's parameters, gradients and optimizer state."""

    def train_step(self, microbatches: Sequence[Batch], settings: StepSettings) -> StepResult:
        """Forward and backward of this rank's micro-batches, then one optimizer step."""
        ...

    def eval_step(self, microbatches: Sequence[Batch]) -> tuple[float, float]:
        """Sum of the losses (nats) and number of unmasked tokens of the micro-batches, over all ranks."""
        ...

    def parameters_norm(self) -> float:
        """L2 norm of all parameters of the model."""
        ...

    def save(self, target: SaveTarget, iteration: int, progress: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Write a checkpoint, or begin to; called by all ranks."""
        ...

    def load(self, source: LoadSource, *, optimizer: bool, log: Callable[[str], None]) -> Loaded | None:
        """Restore the weights, and the optimizer state if asked; None without a checkpoint. Called by all ranks."""
        ...
