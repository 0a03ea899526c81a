"""The training loop: batches in, steps out, and everything that happens every so many iterations."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from megatron.data.batch import Batch
from megatron.data.loader import DataIterators
from megatron.training.engine import Engine, SaveTarget, StepResult, StepSettings
from megatron.training.evaluate import evaluate, evaluation_steps
from megatron.training.lr import LrSchedule, schedule_state
from megatron.training.microbatches import BatchPlan
from megatron.training.report import Evaluation, Printers, dated
from megatron.training.reporter import Reporter
from megatron.training.signals import Exit, ExitRules, SignalFlag, decide_exit
from megatron.training.state import TrainState
from megatron.training.timers import Timers

MOST_BAD_STEPS = 20
"""Steps in a row without finite gradients, at one loss scale, after which the run is given up: it cannot recover."""


class TrainingDivergedError(ValueError):
    """The gradients have not been finite for many steps."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """When things happen, in iterations."""

    train_iters: int
    seq_length: int
    eval_interval: int
    eval_iters: int
    """Steps of an evaluation; 0 = none, -1 = the whole set."""
    save_interval: int | None = None
    skip: Collection[int] = ()
    """Iterations, counted from 1, whose data is read but not trained on."""
    gc_interval: int | None = None
    """Python garbage is collected around evaluations and checkpoints and every so many iterations (0 = never), and
    at no other moment, which keeps ranks in step; None = as Python likes."""
    log_params_norm: bool = False


@dataclass(kw_only=True)
class Training:
    """A run: its parts and how far it is. `state` is the only part that changes."""

    engine: Engine
    data: DataIterators
    schedule: LrSchedule
    plan: BatchPlan
    settings: LoopSettings
    reporter: Reporter
    timers: Timers
    printers: Printers
    exits: ExitRules
    all_reduce_max: Callable[[int], int]
    rank: int
    save_target: SaveTarget | None
    run_record: Mapping[str, Any]
    started: float
    """`time.monotonic()` at the start of the program."""
    profile: Callable[[int], None]
    """Called after every iteration with its number."""
    state: TrainState
    saved_at: int | None = None
    """Iteration of the last checkpoint."""
    _bad_steps: int = 0
    _loss_scale: float = 0.0

    def train(self) -> Exit | None:
        """Train to the end of the run or until something ends it early; returns what did."""
        settings = self.settings
        batches = self.data.train
        assert batches is not None, "training needs training data"
        with _garbage(settings.gc_interval), SignalFlag(self.exits.on_signal) as flag:
            self.reporter.restart()
            leaving = self._exit(flag)
            while leaving is None and self.state.iteration < settings.train_iters:
                self._iterate(batches)
                iteration = self.state.iteration
                if settings.eval_iters and iteration % settings.eval_interval == 0:
                    self._paused(lambda: self.evaluate("validation"))
                if settings.save_interval and iteration % settings.save_interval == 0:
                    self._paused(self.save)
                if settings.gc_interval and iteration % settings.gc_interval == 0:
                    gc.collect()
                leaving = self._exit(flag)
            if self.state.iteration and self.saved_at != self.state.iteration:
                self.save()
        if leaving is not None:
            self.printers.rank0(dated(leaving.message, datetime.now()))
        return leaving

    def _iterate(self, batches: Iterator[Batch]) -> None:
        """One iteration: read, step, report."""
        size = self.plan.at(self.state.samples)
        with self.timers("batch-generator"):
            microbatches = [next(batches) for _ in range(size.microbatches)]
        tokens = size.samples * self.settings.seq_length
        if self.state.iteration + 1 in self.settings.skip:
            self.state = self.state.after_unused(size.samples, tokens)
            self.printers.rank0(f" skipping iteration {self.state.iteration}: its data is not trained on")
            return
        with self.timers("forward-backward"):
            result = self.engine.train_step(microbatches, self._step_settings())
        self.state = self.state.after(result, size.samples, tokens)
        self._check_divergence(result)
        norm = self.engine.parameters_norm if self.settings.log_params_norm else None
        # Megatron logs the rate that its scheduler has moved on to: that of the next step.
        self.reporter.step(self.state, result, lr=self._step_settings().lr, samples=size.samples, params_norm=norm)
        self.profile(self.state.iteration)

    def _check_divergence(self, result: StepResult) -> None:
        """Give up a run that cannot recover; what was saved before stays."""
        bad = result.skipped or not math.isfinite(result.loss)
        # While the scale of float16 still falls, skipped steps are how it finds its value.
        stuck = bad and result.loss_scale == self._loss_scale
        self._bad_steps, self._loss_scale = self._bad_steps + 1 if stuck else 0, result.loss_scale
        if self._bad_steps < MOST_BAD_STEPS:
            return
        saved = "nothing was saved" if self.saved_at is None else f"the last checkpoint is of iteration {self.saved_at}"
        raise TrainingDivergedError(
            f"the loss was {result.loss} and the gradient norm {result.grad_norm} at iteration {self.state.iteration}, "
            f"after {MOST_BAD_STEPS} such iterations in a row; {saved}. Lower --lr, warm up for longer "
            "(--lr-warmup-iters) or clip (--clip-grad)"
        )

    def _step_settings(self) -> StepSettings:
        """The schedules' values here: those of the step that follows."""
        at = self.state.schedule
        return StepSettings(lr=self.schedule.lr(at), weight_decay=self.schedule.weight_decay(at))

    def evaluate(self, split: Literal["validation", "test"], *, final: bool = False) -> Evaluation | None:
        """Evaluate on a split and report; None if the split is empty. Called by all ranks."""
        stream = self.data.valid if split == "validation" else self.data.test
        if stream is None:
            return None
        size = self.plan.final
        with self.timers("eval-time"):
            result = evaluate(self.engine, evaluation_steps(stream, self.settings.eval_iters, size.microbatches))
        whole = self.settings.eval_iters < 0
        samples = stream.num_samples if whole else self.settings.eval_iters * size.samples
        if split == "validation":
            self.state = replace(self.state, valid_samples=self.state.valid_samples + samples)
        evaluation = Evaluation(
            iteration=self.state.iteration,
            consumed_samples=self.state.samples,
            consumed_tokens=self.state.tokens,
            split=split,
            loss=result.loss,
            draw=samples if final else None,
        )
        self.reporter.evaluation(evaluation)
        return evaluation

    def save(self) -> None:
        """Write a checkpoint, if the run is saved. Called by all ranks."""
        if self.save_target is None:
            return
        progress = {
            **self.state.to_progress(),
            "opt_param_scheduler": schedule_state(self.schedule, self.state.schedule),
        }
        with self.timers("save-checkpoint"):
            self.engine.save(self.save_target, self.state.iteration, progress, self.run_record)
        self.saved_at = self.state.iteration

    def _paused(self, action: Callable[[], object]) -> None:
        """Do something that does not count as training time."""
        resume = self.reporter.pause()
        if self.settings.gc_interval is not None:
            gc.collect()
        action()
        resume()

    def _exit(self, flag: SignalFlag) -> Exit | None:
        return decide_exit(
            self.exits,
            rank=self.rank,
            iteration=self.state.iteration,
            minutes=(time.monotonic() - self.started) / 60.0,
            received=flag.received,
            all_reduce_max=self.all_reduce_max,
        )


@contextmanager
def _garbage(interval: int | None) -> Generator[None]:
    """Switch Python's own garbage collection off while an interval is given."""
    if interval is None:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
