"""Sends what happens in a run to everything that wants to know: log lines, metrics file, curves, progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron.accelerators.base import MemoryStats
from megatron.training import tensorboard
from megatron.training.engine import StepResult
from megatron.training.flops import TrainingFlops, throughput
from megatron.training.metrics import MetricsFile, evaluation_record, training_record
from megatron.training.progress import ProgressBar
from megatron.training.report import (
    Evaluation,
    Printer,
    Printers,
    TrainingReport,
    evaluation_lines,
    memory_line,
    summarise,
    training_line,
)
from megatron.training.state import TrainState
from megatron.training.tensorboard import Curves, Progress, Scalar, TensorBoardWriter, WandbWriter
from megatron.training.timers import LogOption, Timers, running_timers, timers_report


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What is reported and how often.

    Attributes:
        interval: iterations between log lines.
        train_iters: length of the run.
        world_size: devices.
        data_parallel_size: replicas of the model.
        parameters: of the model.
        flops: operations of a sample of so many tokens.
        peak_flops: of one device, FLOP/s; None if unknown.
        curves: what goes to TensorBoard.
        curve_interval: iterations between its points.
        throughput: log Megatron-LM's field too.
        memory_interval: iterations between memory lines; None = once, after the first log line.
        timer_level: `--timing-log-level`.
        timer_option: `--timing-log-option`.
    """

    interval: int
    train_iters: int
    world_size: int
    data_parallel_size: int
    parameters: int
    flops: Callable[[int], TrainingFlops]
    peak_flops: float | None
    curves: Curves
    curve_interval: int = 1
    throughput: bool = False
    memory_interval: int | None = None
    timer_level: int = 0
    timer_option: LogOption = "minmax"


@dataclass(kw_only=True)
class Writers:
    """Where records go; all None on ranks that do not write."""

    metrics: MetricsFile | None = None
    tensorboard: TensorBoardWriter | None = None
    wandb: WandbWriter | None = None
    bar: ProgressBar | None = None

    def close(self) -> None:
        """Write what is held back."""
        for writer in (self.metrics, self.tensorboard, self.wandb, self.bar):
            if writer is not None:
                writer.close()


@dataclass(kw_only=True)
class Reporter:
    """Collects the steps of an interval; see the methods for what each event leads to."""

    settings: ReportSettings
    printers: Printers
    memory_printer: Printer
    """Prints on one rank of each part of the model."""
    writers: Writers
    timers: Timers
    rank: int
    memory: Callable[[], MemoryStats]
    gather: Callable[[list[float]], list[list[float]]]
    """Every rank's list of floats, in rank order."""
    _steps: list[StepResult] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)
    _samples: int = 0
    _tokens: int = 0
    _work: TrainingFlops = field(default_factory=lambda: TrainingFlops(0, 0))
    _memory_shown: bool = False

    def step(
        self,
        state: TrainState,
        result: StepResult,
        *,
        lr: float,
        samples: int,
        seq_length: int,
        params_norm: Callable[[], float] | None,
    ) -> None:
        """An optimizer step was taken, on `samples` samples of `seq_length` tokens. Called by all ranks."""
        s = self.settings
        self._steps.append(result)
        self._samples += samples
        self._tokens += samples * seq_length
        self._work += s.flops(seq_length).times(samples)
        logged = state.iteration % s.interval == 0
        norm = params_norm() if params_norm is not None and logged else None
        if self.writers.bar is not None:
            self.writers.bar.advance(result.loss)
        if state.iteration % s.curve_interval == 0:
            self._draw(
                tensorboard.step_scalars(
                    s.curves,
                    _place(state),
                    result,
                    learning_rate=lr,
                    global_batch_size=samples,
                    world_size=s.world_size,
                    params_norm=norm,
                    memory=self.memory() if s.curves.memory else None,
                ),
                state.iteration,
            )
        if result.skipped:
            self.printers.last_rank(
                f"WARNING: iteration {state.iteration} was skipped: the gradient norm is {result.grad_norm} "
                f"(loss {result.loss}, loss scale {result.loss_scale}); the weights are unchanged"
            )
        if logged:
            self._log(state, lr=lr, global_batch_size=samples, params_norm=norm)

    def _log(self, state: TrainState, *, lr: float, global_batch_size: int, params_norm: float | None) -> None:
        """The log line of the steps since the last one, and a new interval."""
        s = self.settings
        seconds = time.perf_counter() - self._started
        speed = throughput(self._work, samples=1, seconds=seconds, devices=s.world_size, peak_flops=s.peak_flops)
        per_second = self._samples / seconds
        report = TrainingReport(
            iteration=state.iteration,
            train_iterations=s.train_iters,
            consumed_samples=state.samples,
            consumed_tokens=state.tokens,
            seconds_per_step=seconds / len(self._steps),
            learning_rate=lr,
            global_batch_size=global_batch_size,
            interval=summarise(self._steps),
            params_norm=params_norm,
            samples_per_second=per_second,
            tokens_per_second_per_device=self._tokens / seconds / s.world_size,
            tflops=speed.tflops,
            mfu=speed.mfu,
            hfu=speed.hfu,
        )
        self.printers.last_rank(training_line(report, log_throughput=s.throughput))
        if self.writers.metrics is not None:
            self.writers.metrics.write(training_record(report))
        if self.writers.wandb is not None:
            metrics = tensorboard.throughput_metrics(
                report, data_parallel_size=s.data_parallel_size, parameters=s.parameters
            )
            self.writers.wandb.write(metrics, state.iteration)
        self._time(state, report.seconds_per_step, len(self._steps))
        self._report_memory(state)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now: what happened since the last log line (an evaluation, a save) is not training."""
        self._steps, self._samples, self._tokens, self._work = [], 0, 0, TrainingFlops(0, 0)
        self._started = time.perf_counter()

    def pause(self) -> Callable[[], None]:
        """Stop the clock of the interval; call the result to let it go on."""
        stopped = time.perf_counter()

        def resume() -> None:
            self._started += time.perf_counter() - stopped

        return resume

    def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation ended."""
        self.printers.last_rank(evaluation_lines(evaluation))
        if self.writers.metrics is not None:
            self.writers.metrics.write(evaluation_record(evaluation))
        self._draw(tensorboard.evaluation_scalars(self.settings.curves, evaluation), evaluation.iteration)

    def _time(self, state: TrainState, seconds_per_step: float, steps: int) -> None:
        """The lines and curves of the timers; a collective call when timers run."""
        s = self.settings
        names, rows = running_timers(s.timer_level), list[list[float]]()
        if s.timer_level > 0 or s.curves.timers:
            rows = self.gather(self.timers.take(names))
        if s.timer_level > 0:
            text = timers_report(names, rows, s.timer_option, steps=steps)
            if text is not None:
                self.printers.last_rank(text)
        scalars = tensorboard.interval_scalars(
            s.curves, _place(state), seconds_per_step, names if rows else (), rows, steps=steps
        )
        self._draw(scalars, state.iteration)

    def _report_memory(self, state: TrainState) -> None:
        every = self.settings.memory_interval
        due = not self._memory_shown if every is None else state.iteration % every == 0
        if due:
            self._memory_shown = True
            self.memory_printer(memory_line(self.rank, state.iteration, self.memory()))

    def _draw(self, scalars: Sequence[Scalar], iteration: int) -> None:
        if self.writers.tensorboard is not None:
            self.writers.tensorboard.write(scalars)
        if self.writers.wandb is not None:
            self.writers.wandb.write(tensorboard.over_iterations(scalars), iteration)

    def close(self) -> None:
        """Write what is held back."""
        self.writers.close()


def _place(state: TrainState) -> Progress:
    return Progress(state.iteration, state.samples, state.tokens)
