"""Curves for TensorBoard and Weights & Biases.

Tags are those of Megatron-DeepSpeed (`lm-loss-training/lm loss`, `grad-norm/grad-norm` ...), most of them three times:
over iterations, and with ` vs samples` and ` vs tokens` over what was consumed. Only the last rank writes.

After a resume, points that an abandoned run wrote stay in TensorBoard's files: they cannot be purged by step, since the
curves do not share one kind of step. `--log-json` is the record without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron.accelerators.base import MemoryStats
from megatron.training.report import Evaluation, ReportError, Step, TrainingReport


class Scalar(NamedTuple):
    """A point of a curve."""

    tag: str
    value: float
    x: int


@dataclass(frozen=True)
class Progress:
    """Where a point lies."""

    iteration: int
    samples: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Which curves are wanted: the `--[no-]log-...-to-tensorboard` flags."""

    timers: bool = False
    batch_size: bool = False
    learning_rate: bool = True
    loss_scale: bool = True
    validation_ppl: bool = False
    memory: bool = False
    world_size: bool = False


def _three(tag: str, value: Any, at: Progress) -> list[Scalar]:
    """The curve over iterations, samples and tokens; nothing for None."""
    if value is None:
        return []
    places = ((tag, at.iteration), (f"{tag} vs samples", at.samples), (f"{tag} vs tokens", at.tokens))
    return [Scalar(name, float(value), x) for name, x in places]


def step_scalars(
    curves: Curves,
    at: Progress,
    step: Step,
    *,
    learning_rate: float,
    global_batch_size: int,
    world_size: int,
    params_norm: float | None = None,
    memory: MemoryStats | None = None,
) -> list[Scalar]:
    """The points of one training step."""
    scalars = [
        Scalar("steps-vs-samples/y=steps,x=samples", at.iteration, at.samples),
        Scalar("steps-vs-samples/y=samples,x=steps", at.samples, at.iteration),
        Scalar("steps-vs-tokens/y=steps,x=tokens", at.iteration, at.tokens),
        Scalar("steps-vs-tokens/y=tokens,x=steps", at.tokens, at.iteration),
    ]
    scalars += _three("learning-rate/learning-rate", learning_rate if curves.learning_rate else None, at)
    scalars += _three("batch-size/batch-size", global_batch_size if curves.batch_size else None, at)
    scalars += _three("lm-loss-training/lm loss", step.loss, at)
    if step.router is not None:
        scalars += _three("moe-loss/moe loss", step.router.loss, at)
        scalars += _three("load_balancing_loss", step.router.balance, at)
        scalars += _three("z_loss", step.router.z, at)
    scalars += _three("loss-scale/loss-scale", step.loss_scale if curves.loss_scale else None, at)
    scalars += _three("world-size/world-size", world_size if curves.world_size else None, at)
    scalars += _three("grad-norm/grad-norm", step.grad_norm, at)
    scalars += _three("num-zeros/num-zeros", step.num_zeros, at)
    scalars += _three("params-norm/params-norm", params_norm, at)
    if curves.memory and memory is not None:
        scalars += [
            Scalar("mem-reserved-bytes", memory.reserved, at.iteration),
            Scalar("mem-allocated-bytes", memory.allocated, at.iteration),
            Scalar("mem-max-allocated-bytes", memory.max_allocated, at.iteration),
        ]
    return scalars


def interval_scalars(
    curves: Curves,
    at: Progress,
    seconds_per_step: float,
    names: Sequence[str] = (),
    seconds: Sequence[Sequence[float]] = (),
    *,
    steps: int = 1,
) -> list[Scalar]:
    """The points of one log line: the time of a step, and the slowest rank's time (s) per timer and step.

    Args:
        curves: what is wanted; without `timers` there are no points.
        at: the end of the interval.
        seconds_per_step: wall time of one step.
        names: names of the timers.
        seconds: for every rank, its seconds per name.
        steps: steps in the interval.
    """
    if not curves.timers:
        return []
    slowest = [(name, max(row[column] for row in seconds)) for column, name in enumerate(names)]
    return _three("iteration-time/iteration-time", seconds_per_step, at) + [
        Scalar(f"{name}-time", time / steps, at.iteration) for name, time in slowest if time > 0.0
    ]


def evaluation_scalars(curves: Curves, evaluation: Evaluation) -> list[Scalar]:
    """The points of one evaluation."""
    tag = f"lm-loss-validation/lm loss {evaluation.split}"
    at = Progress(evaluation.iteration, evaluation.consumed_samples, evaluation.consumed_tokens)
    return _three(tag, evaluation.loss, at) + _three(
        f"{tag} ppl", evaluation.perplexity if curves.validation_ppl else None, at
    )


class TensorBoardWriter:
    """Writes points to a TensorBoard directory.

    Args:
        directory: `--tensorboard-dir`.
        queue_size: `--tensorboard-queue-size`, points held back before they are written.

    Raises:
        ReportError: the package `tensorboard` is missing.
    """

    def __init__(self, directory: Path, queue_size: int = 1000) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ReportError("--tensorboard-dir needs the package tensorboard: pip install tensorboard") from None
        self._writer: Any = SummaryWriter(log_dir=str(directory), max_queue=queue_size)

    def write(self, scalars: Iterable[Scalar]) -> None:
        """Add points."""
        for tag, value, x in scalars:
            self._writer.add_scalar(tag, value, x)

    def close(self) -> None:
        """Write what is held back."""
        self._writer.close()


def throughput_metrics(report: TrainingReport, *, data_parallel_size: int, parameters: int) -> dict[str, float]:
    """What Megatron-DeepSpeed sends to Weights & Biases only; a "replica" is a data-parallel rank."""
    tokens = report.consumed_tokens / max(1, report.consumed_samples) * report.samples_per_second
    return {
        "throughput/iteration-time": report.seconds_per_step,
        "throughput/samples_per_sec": report.samples_per_second,
        "throughput/samples_per_sec_per_replica": report.samples_per_second / data_parallel_size,
        "throughput/tokens_per_sec": tokens,
        "throughput/tokens_per_sec_per_replica": tokens / data_parallel_size,
        "throughput/tokens_per_gpu_per_sec": report.tokens_per_second_per_device,
        "throughput/tflops": report.tflops,
        "throughput/approx_params_in_billions": parameters / 1e9,
        "throughput/elapsed_ms_per_iteration": report.seconds_per_step * 1000.0,
        "loss/lm loss": report.interval.loss,
    }


def over_iterations(scalars: Iterable[Scalar]) -> dict[str, float]:
    """The points that lie over iterations, by tag: Weights & Biases has one step for all curves."""
    return {
        scalar.tag: scalar.value
        for scalar in scalars
        if not scalar.tag.endswith((" vs samples", " vs tokens", "x=samples", "x=tokens"))
    }


class WandbWriter:
    """Sends metrics to Weights & Biases.

    Args:
        project: `--wandb-project`.
        entity: `--wandb-entity`, user or team; empty for the default.
        name: `--wandb-exp-name`; empty for a random one.
        directory: `--wandb-save-dir`; None for the default.
        config: the settings of the run.

    Raises:
        ReportError: the package `wandb` is missing.
    """

    def __init__(
        self, project: str, *, entity: str = "", name: str = "", directory: Path | None, config: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise ReportError("--wandb-project needs the package wandb: pip install wandb") from None
        self._run: Any = wandb.init(
            project=project,
            entity=entity or None,
            name=name or None,
            dir=None if directory is None else str(directory),
            config=dict(config),
        )

    def write(self, metrics: Mapping[str, float], iteration: int) -> None:
        """Send the metrics of an iteration."""
        self._run.log(dict(metrics), step=iteration)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()
