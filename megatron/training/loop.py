"""The training loop: batches in, steps out, and everything that happens every so many iterations."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from megatron.checkpoint import WRITER
from megatron.data.loader import DataIterators
from megatron.training.anomalies import Anomaly, AnomalyWatch
from megatron.training.engine import Engine, SaveTarget, StepResult, StepSettings
from megatron.training.evaluate import evaluate, evaluation_steps
from megatron.training.lr import LrSchedule, schedule_state
from megatron.training.microbatches import BatchPlan
from megatron.training.report import Evaluation, Printers, dated
from megatron.training.reporter import Reporter
from megatron.training.signals import Exit, ExitRules, SignalFlag, decide_exit
from megatron.training.state import TrainState
from megatron.training.timers import Timers
from megatron.training.watchdog import Watchdog

MOST_BAD_STEPS = 20
"""Steps in a row without finite gradients, at one loss scale, after which the run is given up: it cannot recover."""
MOST_ROLLBACKS = 5
"""Times that a run goes back to one checkpoint."""


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


@dataclass(frozen=True)
class Restart:
    """An earlier point of the run to go on from."""

    state: TrainState
    schedule: LrSchedule
    data: DataIterators


@dataclass(kw_only=True)
class Training:
    """A run: its parts and how far it is. Only `state` changes, and with a rollback `schedule` and `data`."""

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
    go_back: Callable[[], Restart | None]
    """Restores the last checkpoint of the run; None if there is none."""
    anomalies: AnomalyWatch
    watchdog: Watchdog
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
    _left_out: set[int] = field(default_factory=set)
    """Iterations that a rollback leads around."""
    _rollbacks: int = 0
    """Since the last checkpoint that a step was trained for."""

    def train(self) -> Exit | None:
        """Train to the end of the run or until something ends it early; returns what did.

        Raises:
            SaveError: a checkpoint could not be written.
            TrainingDivergedError: the run cannot or must not go on.
        """
        try:
            with (
                _garbage(self.settings.gc_interval),
                SignalFlag(self.exits.on_signal) as flag,
                self.watchdog.watched("training"),
            ):
                leaving = self._loop(flag)
        except TrainingDivergedError:
            self._finish_saving()
            raise
        if leaving is not None:
            self.printers.rank0(dated(leaving.message, datetime.now()))
        return leaving

    def _loop(self, flag: SignalFlag) -> Exit | None:
        settings = self.settings
        self.reporter.restart()
        leaving = self._exit(flag, iteration=0)
        while leaving is None and self.state.iteration < settings.train_iters:
            self._iterate()
            self._after_iteration()
            leaving = self._exit(flag, iteration=self.state.iteration)
        if self.state.iteration and self.saved_at != self.state.iteration:
            self.save()
        self._finish_saving()
        return leaving

    def _after_iteration(self) -> None:
        """What happens every so many iterations."""
        settings, iteration = self.settings, self.state.iteration
        if settings.eval_iters and iteration % settings.eval_interval == 0:
            self._paused(lambda: self.evaluate("validation"))
        if settings.save_interval and iteration % settings.save_interval == 0:
            self._paused(self.save)
        if settings.gc_interval and iteration % settings.gc_interval == 0:
            gc.collect()

    def _iterate(self) -> None:
        """One iteration: read, step, report."""
        number = self.state.iteration + 1
        self.watchdog.begin(f"iteration {number}")
        size = self.plan.at(self.state.samples)
        batches = self.data.train
        assert batches is not None, "training needs training data"
        with self.timers("batch-generator"):
            read = (next(batches) for _ in range(size.microbatches // size.pieces))
            microbatches = [batch for whole in read for batch in whole.cut(size.pieces)]
        tokens = size.samples * self.settings.seq_length // size.pieces
        if number in self.settings.skip or number in self._left_out:
            self.state = self.state.after_unused(size.samples, tokens)
            self.printers.rank0(f" skipping iteration {number}: its data is not trained on")
            return
        with self.timers("forward-backward"):
            result = self.engine.train_step(microbatches, self._step_settings())
        self.watchdog.end_of_iteration()
        if (anomaly := self.anomalies.judge(result)) is not None and anomaly.policy != "skip":
            self._leave_or_go_back(number, anomaly)
            return
        if anomaly is not None:
            self.printers.rank0(f"WARNING: iteration {number} is left out: {anomaly.what}")
        self.state = self.state.after(result, size.samples, tokens)
        self._check_divergence(result)
        norm = self.engine.parameters_norm if self.settings.log_params_norm else None
        # Megatron logs the rate that its scheduler has moved on to: that of the next step.
        lr = self._step_settings().lr
        length = self.settings.seq_length // size.pieces
        self.reporter.step(self.state, result, lr=lr, samples=size.samples, seq_length=length, params_norm=norm)
        self.profile(self.state.iteration)

    def _leave_or_go_back(self, number: int, anomaly: Anomaly) -> None:
        """End the run at a step that should not have been taken, or go back and lead around its data."""
        what = f"iteration {number}: {anomaly.what}"
        if anomaly.policy == "stop":
            raise TrainingDivergedError(f"{what} (--on-nan, --on-loss-spike); {self._last_saved()}")
        self._finish_saving()
        self._rollbacks += 1
        restart = self.go_back() if self._rollbacks <= MOST_ROLLBACKS else None
        if restart is None:
            raise TrainingDivergedError(
                f"{what}; {self._last_saved()}, and the run has gone back {self._rollbacks - 1} times since"
            )
        self._left_out.add(number)
        self.state, self.schedule, self.data = restart.state, restart.schedule, restart.data
        self.anomalies.forget()
        self.reporter.restart()
        self.printers.rank0(f"WARNING: {what}; WENT BACK to iteration {self.state.iteration}, to go on without it")

    def _last_saved(self) -> str:
        return "nothing was saved" if self.saved_at is None else f"the last checkpoint is of iteration {self.saved_at}"

    def _check_divergence(self, result: StepResult) -> None:
        """Give up a run that cannot recover; what was saved before stays."""
        bad = result.skipped or not math.isfinite(result.loss)
        # While the scale of float16 still falls, skipped steps are how it finds its value.
        stuck = bad and result.loss_scale == self._loss_scale
        self._bad_steps, self._loss_scale = self._bad_steps + 1 if stuck else 0, result.loss_scale
        if self._bad_steps < MOST_BAD_STEPS:
            return
        raise TrainingDivergedError(
            f"the loss was {result.loss} and the gradient norm {result.grad_norm} at iteration {self.state.iteration}, "
            f"after {MOST_BAD_STEPS} such iterations in a row; {self._last_saved()}. Lower --lr, warm up for longer "
            "(--lr-warmup-iters) or clip (--clip-grad)"
        )

    def _step_settings(self) -> StepSettings:
        """The schedules' values here: those of the step that follows."""
        at = self.state.schedule
        return StepSettings(
            lr=self.schedule.lr(at),
            weight_decay=self.schedule.weight_decay(at),
            highest_loss=self.anomalies.highest_loss,
        )

    def evaluate(self, split: Literal["validation", "test"], *, final: bool = False) -> Evaluation | None:
        """Evaluate on a split and report; None if the split is empty. Called by all ranks."""
        stream = self.data.valid if split == "validation" else self.data.test
        if stream is None:
            return None
        size = self.plan.final
        steps = evaluation_steps(stream, self.settings.eval_iters, size.microbatches)
        with self.timers("eval-time"), self.watchdog.watched("evaluation"):
            result = evaluate(self.engine, self.watchdog.each(steps, "evaluation"))
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
        """Write a checkpoint, or begin to, if the run is saved. Called by all ranks."""
        if self.save_target is None:
            return
        progress = {
            **self.state.to_progress(),
            "opt_param_scheduler": schedule_state(self.schedule, self.state.schedule),
        }
        with self.timers("save-checkpoint"), self._saving():
            self.engine.save(self.save_target, self.state.iteration, progress, self.run_record)
        self.saved_at = self.state.iteration
        if self.saved_at not in self._left_out:  # else nothing shows that the run can go on from here
            self._rollbacks = 0

    def _finish_saving(self) -> None:
        if self.save_target is not None:
            with self._saving():
                self.save_target.saver.finish()

    def _saving(self) -> AbstractContextManager[None]:
        return self.watchdog.watched("saving", computes=False, helper=WRITER)

    def _paused(self, action: Callable[[], object]) -> None:
        """Do something that does not count as training time."""
        resume = self.reporter.pause()
        if self.settings.gc_interval is not None:
            gc.collect()
        action()
        resume()

    def _exit(self, flag: SignalFlag, *, iteration: int) -> Exit | None:
        return decide_exit(
            self.exits,
            rank=self.rank,
            iteration=iteration,
            samples=self.state.samples,
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
