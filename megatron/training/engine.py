"""What a training engine does; the two engines are `native` (PyTorch's own distributed stack) and `deepspeed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.checkpoint import Loaded
from megatron.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean loss per unmasked token (nats) over the global batch."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    skipped: bool = False
    """The gradients were not finite, so the weights were left alone."""
    loss_scale: float = 1.0
    num_zeros: int | None = None
    """Zeros among all gradient elements; None unless asked for."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The values of the schedules at this step."""

    lr: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class SaveTarget:
    """Where checkpoints go, and which old ones stay; see `megatron.checkpoint.save`."""

    root: Path
    optimizer: bool = True
    """Whether the optimizer state is saved."""
    keep_last: int | None = None
    retain_interval: int | None = None
    log: Callable[[str], None] = print


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

    def save(self, target: SaveTarget, iteration: int, progress: Mapping[str, Any], run: Mapping[str, Any]) -> Path:
        """Write a checkpoint; called by all ranks."""
        ...

    def load(self, root: Path, iteration: int | None, *, optimizer: bool, log: Callable[[str], None]) -> Loaded | None:
        """Restore the weights, and the optimizer state if asked; None without a checkpoint. Called by all ranks."""
        ...
