"""What a run says: the log lines that Megatron's users and tools know, as pure functions of the numbers.

The last rank prints the lines of training and evaluation, as in Megatron; rank 0 prints the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from megatron.accelerators.base import MemoryStats
from megatron.training.router_losses import RouterReport, mean

_MEGABYTE = 1024.0 * 1024.0
_LARGEST_EXPONENT = 20.0  # Megatron's: the perplexity of a hopeless loss still has a finite value


class ReportError(ValueError):
    """Something that was asked to be reported and cannot be."""


class Printer:
    """Prints on the ranks that it was made for and does nothing on the others."""

    def __init__(self, enabled: bool, write: Callable[[str], None] | None = None) -> None:
        self._enabled = enabled
        self._write = write or _write_line

    def __call__(self, text: str) -> None:
        """Print `text` and a line end at once."""
        if self._enabled:
            self._write(text)


def _write_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Printers:
    """Printers of one rank: `rank0` prints on the first rank only, `last_rank` on the last only, `every` on all."""

    rank0: Printer
    last_rank: Printer
    every: Printer

    @classmethod
    def of(cls, rank: int, world_size: int, write: Callable[[str], None] | None = None) -> Printers:
        """The printers of rank `rank`; `write` prints one line (default: to standard output)."""
        return cls(Printer(rank == 0, write), Printer(rank == world_size - 1, write), Printer(True, write))


def dated(text: str, now: datetime) -> str:
    """A line that says when something happened."""
    return f"[{text}] datetime: {now:%Y-%m-%d %H:%M:%S} "


class Step(Protocol):
    """What one optimizer step did; numbers may be tensors that are still being computed on the device."""

    @property
    def loss(self) -> Any:
        """Mean loss per token in nats."""

    @property
    def grad_norm(self) -> Any:
        """Global norm of the gradients, or None."""

    @property
    def skipped(self) -> bool:
        """Whether the weights were left alone."""

    @property
    def loss_scale(self) -> Any:
        """Scale of the loss, or None."""

    @property
    def num_zeros(self) -> Any:
        """Zeros among the gradient elements, or None."""

    @property
    def router(self) -> RouterReport | None:
        """What the routers did; None without experts."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The steps since the last log line.

    Attributes:
        steps: how many.
        loss: mean over the applied steps; if none was applied, over all.
        grad_norm: of the last step.
        loss_scale: of the last step.
        num_zeros: of the last step.
        router: mean over the steps; None without experts.
        skipped: steps whose update was skipped.
        nans: steps whose loss was not finite.
    """

    steps: int
    loss: float
    grad_norm: float | None
    loss_scale: float | None
    num_zeros: float | None
    router: RouterReport | None = None
    skipped: int
    nans: int


def summarise(steps: Sequence[Step]) -> Interval:
    """The summary of at least one step. Only here numbers are read from the device, once per log line."""
    losses = [float(step.loss) for step in steps]
    applied = [loss for loss, step in zip(losses, steps, strict=True) if not step.skipped] or losses
    last = steps[-1]
    return Interval(
        steps=len(steps),
        loss=sum(applied) / len(applied),
        grad_norm=_optional(last.grad_norm),
        loss_scale=_optional(last.loss_scale),
        num_zeros=_optional(last.num_zeros),
        router=mean(routed) if (routed := [step.router for step in steps if step.router is not None]) else None,
        skipped=sum(step.skipped for step in steps),
        nans=sum(not math.isfinite(loss) for loss in losses),
    )


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """The numbers of one log line.

    Attributes:
        iteration: steps done since the start of training.
        train_iterations: steps of the whole run.
        consumed_samples: samples seen so far.
        consumed_tokens: tokens seen so far.
        seconds_per_step: wall time of a step, mean over the interval.
        learning_rate: of the last step.
        global_batch_size: samples of the last step.
        interval: summary of the steps.
        params_norm: norm of the parameters; None unless asked for.
        samples_per_second: of the whole run.
        tokens_per_second_per_device: of one device.
        tflops: 10^12 model operations per second and device.
        mfu: share of the device's peak; None if the peak is unknown.
        hfu: the same with recomputed operations.
    """

    iteration: int
    train_iterations: int
    consumed_samples: int
    consumed_tokens: int
    seconds_per_step: float
    learning_rate: float
    global_batch_size: int
    interval: Interval
    params_norm: float | None = None
    samples_per_second: float
    tokens_per_second_per_device: float
    tflops: float
    mfu: float | None = None
    hfu: float | None = None


def training_line(report: TrainingReport, *, log_throughput: bool = False) -> str:
    """The line of Megatron-DeepSpeed, field by field, then the utilisation.

    With `log_throughput`, the field of Megatron-LM's `--log-throughput` stands where Megatron-LM has it.
    """
    r, interval = report, report.interval
    fields = [
        f"iteration {r.iteration:8d}/{r.train_iterations:8d}",
        f"consumed samples: {r.consumed_samples:12d}",
        f"consumed tokens: {r.consumed_tokens:12d}",
        f"elapsed time per iteration (ms): {r.seconds_per_step * 1000.0:.1f}",
        _field("throughput per GPU (TFLOP/s/GPU)", r.tflops if log_throughput else None, ".1f"),
        f"learning rate: {r.learning_rate:.3E}",
        f"global batch size: {r.global_batch_size:5d}",
        _field("lm loss", interval.loss, ".6E"),
        *_router_fields(interval.router),
        _field("loss scale", interval.loss_scale, ".1f"),
        _field("grad norm", interval.grad_norm, ".3f"),
        _field("num zeros", interval.num_zeros, ".1f"),
        _field("params norm", r.params_norm, ".3f"),
        f"number of skipped iterations: {interval.skipped:3d}",
        f"number of nan iterations: {interval.nans:3d}",
        f"samples per second: {r.samples_per_second:.3f}",
        f"tokens per gpu per second (tgs): {r.tokens_per_second_per_device:.3f}",
        f"TFLOPs: {r.tflops:.2f}",
        _field("MFU", r.mfu, ".1%"),
        _field("HFU", r.hfu if r.hfu != r.mfu else None, ".1%"),
    ]
    return " " + " | ".join(field for field in fields if field) + " |"


def _router_fields(router: RouterReport | None) -> list[str]:
    """Megatron-DeepSpeed's sum of what routers add to the loss, and Megatron-LM's means of a layer."""
    if router is None:
        return []
    return [
        _field("moe loss", router.loss, ".6E"),
        _field("load_balancing_loss", router.balance, ".6E"),
        _field("z_loss", router.z, ".6E"),
        _field("dropped tokens", router.dropped, ".2%"),
    ]


def _field(name: str, value: float | None, form: str) -> str:
    """`name: value`, nothing for None; `nan` and `inf` in lower case, as tools search for them."""
    if value is None:
        return ""
    return f"{name}: {format(value, form) if math.isfinite(value) else value}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        iteration: training steps done before it.
        consumed_samples: training samples seen before it.
        consumed_tokens: training tokens seen before it.
        split: which data.
        loss: mean loss per token in nats.
        draw: number of samples, if the text is to say it (after training).
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    split: Literal["validation", "test"]
    loss: float
    draw: int | None = None

    @property
    def perplexity(self) -> float:
        """Exponential of the loss, at most e^20."""
        return math.exp(min(self.loss, _LARGEST_EXPONENT))  # in this order, or NaN would become e^20


def evaluation_lines(evaluation: Evaluation) -> str:
    """Megatron's block of three lines."""
    where = f"iteration {evaluation.iteration}"
    if evaluation.draw is not None:
        where += f" on {evaluation.draw}-sample draw from {evaluation.split} set"
    loss = _field("lm loss value", evaluation.loss, ".6E")
    perplexity = _field("lm loss PPL", evaluation.perplexity, ".6E")
    text = f" validation loss at {where} | {loss} | {perplexity} | "
    rule = "-" * (len(text) + 1)
    return "\n".join((rule, text, rule))


def memory_line(rank: int, iteration: int, memory: MemoryStats) -> str:
    """The device memory of one rank, in MB of 2^20 bytes."""
    fields = (
        ("allocated", memory.allocated),
        ("max allocated", memory.max_allocated),
        ("reserved", memory.reserved),
        ("max reserved", memory.max_reserved),
    )
    values = " | ".join(f"{name}: {count / _MEGABYTE:.1f}" for name, count in fields)
    return f"[Rank {rank}] (after {iteration} iterations) memory (MB) | {values}"
