"""Learning-rate and weight-decay schedules: pure functions of how much has been trained.

The unit is the sample, as in Megatron's `OptimizerParamScheduler`: a schedule given in iterations is converted with
the global batch size, so a batch-size ramp-up or another batch size does not bend the curve. Given `--lr-decay-tokens`
or `--lr-warmup-tokens`, the unit is the token (Megatron-DeepSpeed). A step that was skipped (fp16 overflow) does not
count, so the position is kept apart from the number of consumed samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]
Unit = Literal["samples", "tokens"]

LR_STYLES: tuple[str, ...] = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES: tuple[str, ...] = ("exponential", "linear", "cosine", "minus_sqrt")
WEIGHT_DECAY_STYLES: tuple[str, ...] = ("constant", "linear", "cosine")


class ScheduleError(ValueError):
    """A schedule that cannot be, or one that disagrees with the checkpoint."""


@dataclass(frozen=True)
class SchedulePosition:
    """How much has been trained, counting applied steps only."""

    samples: int = 0
    tokens: int = 0

    def after(self, samples: int, tokens: int) -> SchedulePosition:
        """The position after a step that was applied to `samples` samples with `tokens` tokens."""
        return SchedulePosition(self.samples + samples, self.tokens + tokens)


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """A learning-rate curve and a weight-decay curve.

    Attributes:
        max_lr: the peak, reached at the end of the warm-up.
        min_lr: the value at and after the end of the decay.
        init_lr: where the warm-up starts.
        style: shape of the decay between warm-up and `decay`.
        unit: unit of `warmup`, `decay` and `wsd_decay`.
        warmup: length of the linear warm-up; 0 is none. A fraction of a sample is allowed.
        decay: position, counted from the start of training, where the decay ends.
        wsd_style: shape of the last phase of warm-up, stable, decay (WSD, arXiv:2404.06395).
        wsd_decay: length of that last phase; None without WSD.
        start_wd: weight decay at the start of training.
        end_wd: weight decay from `wd_incr_samples` on.
        wd_style: shape in between.
        wd_incr_samples: length of the increase in samples.

    Raises:
        ScheduleError: a value that the formulas do not allow.
    """

    max_lr: float
    min_lr: float = 0.0
    init_lr: float = 0.0
    style: DecayStyle = "linear"
    unit: Unit = "samples"
    warmup: float = 0
    decay: int
    wsd_style: WsdStyle = "exponential"
    wsd_decay: int | None = None
    start_wd: float = 0.0
    end_wd: float = 0.0
    wd_style: WeightDecayStyle = "constant"
    wd_incr_samples: int

    def __post_init__(self) -> None:
        wrong = list(_violations(self))
        if wrong:
            raise ScheduleError("\n".join(wrong))

    def lr(self, at: SchedulePosition) -> float:
        """The learning rate of the step that follows `at`."""
        now = at.tokens if self.unit == "tokens" else at.samples
        if self.warmup > 0 and now <= self.warmup:
            return self.init_lr + (self.max_lr - self.init_lr) * now / self.warmup
        if self.style == "constant":
            return self.max_lr
        if now > self.decay:
            return self.min_lr
        if self.style == "inverse-square-root":
            return max(self.min_lr, self.max_lr * math.sqrt(max(self.warmup, 1) / max(now, 1)))
        return self.min_lr + (self.max_lr - self.min_lr) * self._remaining(now)

    def _remaining(self, now: int) -> float:
        """The part of `max_lr - min_lr` that is left at `now`, which lies between warm-up and the end of the decay."""
        if self.style == "WSD":
            assert self.wsd_decay is not None
            start = self.decay - self.wsd_decay
            return 1.0 if now <= start else _shape(self.wsd_style, (now - start) / self.wsd_decay)
        return _shape(self.style, (now - self.warmup) / (self.decay - self.warmup))

    def weight_decay(self, at: SchedulePosition) -> float:
        """The weight decay of the step that follows `at`. Always a function of samples."""
        if self.wd_style == "constant" or at.samples > self.wd_incr_samples:
            return self.end_wd
        done = at.samples / self.wd_incr_samples
        risen = done if self.wd_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * (1.0 - done)))
        return self.start_wd + (self.end_wd - self.start_wd) * risen


def _shape(style: str, ratio: float) -> float:
    """Falls from 1 at `ratio` 0 to 0 at `ratio` 1."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * ratio))
    if style == "exponential":
        return 2.0 * math.pow(0.5, ratio) - 1.0
    return 1.0 - math.sqrt(ratio)


def _violations(s: LrSchedule) -> list[str]:
    """What is wrong with the schedule, one line each."""
    checks = (
        (s.style in LR_STYLES, f"--lr-decay-style is {s.style!r}; allowed: {', '.join(LR_STYLES)}"),
        (s.wsd_style in WSD_STYLES, f"--lr-wsd-decay-style is {s.wsd_style!r}; allowed: {', '.join(WSD_STYLES)}"),
        (
            s.wd_style in WEIGHT_DECAY_STYLES,
            f"--weight-decay-incr-style is {s.wd_style!r}; allowed: {', '.join(WEIGHT_DECAY_STYLES)}",
        ),
        (0.0 <= s.min_lr <= s.max_lr, f"--min-lr is {s.min_lr}; it must lie between 0 and --lr ({s.max_lr})"),
        (0.0 <= s.init_lr <= s.max_lr, f"--lr-warmup-init is {s.init_lr}; it must lie between 0 and --lr ({s.max_lr})"),
        (s.decay > 0, f"the learning-rate decay ends after {s.decay} {s.unit}; it must end after more than 0"),
        (
            0 <= s.warmup < s.decay,
            f"the warm-up lasts {s.warmup:g} {s.unit} and the decay ends after {s.decay}; the warm-up must end before. "
            f"Shorten it (--lr-warmup-*) or decay for longer (--lr-decay-*)",
        ),
        (
            s.style != "WSD" or (s.wsd_decay is not None and 0 < s.wsd_decay <= s.decay - s.warmup),
            f"--lr-decay-style WSD decays over the last {s.wsd_decay} {s.unit} of {s.decay}; give "
            f"--lr-wsd-decay-iters or --lr-wsd-decay-samples, at most what is left after the warm-up",
        ),
        (
            0.0 <= s.start_wd <= s.end_wd,
            f"weight decay goes from {s.start_wd} to {s.end_wd}; "
            f"it needs 0 <= --start-weight-decay <= --end-weight-decay",
        ),
        (
            s.wd_style != "constant" or s.start_wd == s.end_wd,
            f"weight decay goes from {s.start_wd} to {s.end_wd} but --weight-decay-incr-style is constant; "
            f"use linear or cosine",
        ),
        (s.wd_incr_samples > 0, f"weight decay increases over {s.wd_incr_samples} samples; it must be more than 0"),
    )
    return [message for holds, message in checks if not holds]


def build_schedule(
    *,
    lr: float,
    global_batch_size: int,
    seq_length: int,
    train_iters: int | None = None,
    train_samples: int | None = None,
    min_lr: float = 0.0,
    lr_decay_style: DecayStyle = "linear",
    lr_decay_iters: int | None = None,
    lr_decay_samples: int | None = None,
    lr_decay_tokens: int | None = None,
    lr_warmup_fraction: float | None = None,
    lr_warmup_iters: int = 0,
    lr_warmup_samples: int = 0,
    lr_warmup_tokens: int | None = None,
    lr_warmup_init: float = 0.0,
    lr_wsd_decay_style: WsdStyle = "exponential",
    lr_wsd_decay_iters: int | None = None,
    lr_wsd_decay_samples: int | None = None,
    weight_decay: float = 0.01,
    start_weight_decay: float | None = None,
    end_weight_decay: float | None = None,
    weight_decay_incr_style: WeightDecayStyle = "constant",
) -> LrSchedule:
    """The schedule that Megatron's flags of the same names describe.

    The length of the run is given by exactly one of `train_iters` and `train_samples`; lengths of the schedule are
    given in the same unit, or in tokens. When only one of warm-up and decay is in tokens, the other is converted with
    `seq_length`, so that both are measured alike.

    Raises:
        ScheduleError: naming the flags that contradict each other.
    """
    total = _samples("train", train_iters, train_samples, train_iters is not None, global_batch_size)
    if total is None or (train_iters is not None and train_samples is not None):
        raise ScheduleError("give exactly one of --train-iters and --train-samples")
    by_iterations = train_iters is not None
    decay = _samples("lr-decay", lr_decay_iters, lr_decay_samples, by_iterations, global_batch_size) or total
    wsd = _samples("lr-wsd-decay", lr_wsd_decay_iters, lr_wsd_decay_samples, by_iterations, global_batch_size)
    warmup: float | None = _samples(
        "lr-warmup", lr_warmup_iters or None, lr_warmup_samples or None, by_iterations, global_batch_size
    )
    _one_warmup(lr_warmup_fraction, warmup, lr_warmup_tokens)
    tokens = lr_decay_tokens is not None or lr_warmup_tokens is not None
    if tokens:
        decay = lr_decay_tokens if lr_decay_tokens is not None else decay * seq_length
        wsd = None if wsd is None else wsd * seq_length
        warmup = lr_warmup_tokens if lr_warmup_tokens is not None else (warmup or 0) * seq_length
    if lr_warmup_fraction is not None:
        warmup = lr_warmup_fraction * decay
    return LrSchedule(
        max_lr=lr,
        min_lr=min_lr,
        init_lr=lr_warmup_init,
        style=lr_decay_style,
        unit="tokens" if tokens else "samples",
        warmup=warmup or 0,
        decay=decay,
        wsd_style=lr_wsd_decay_style,
        wsd_decay=wsd,
        start_wd=weight_decay if start_weight_decay is None else start_weight_decay,
        end_wd=weight_decay if end_weight_decay is None else end_weight_decay,
        wd_style=weight_decay_incr_style,
        wd_incr_samples=total,
    )


def _samples(name: str, iters: int | None, samples: int | None, by_iterations: bool, batch_size: int) -> int | None:
    """A length in samples, given in the unit of the run."""
    given, other = ("iters", "samples") if by_iterations else ("samples", "iters")
    if (samples if by_iterations else iters) is not None:
        raise ScheduleError(
            f"--{name}-{other} was given but the run is measured by --train-{given}; use --{name}-{given}"
        )
    if by_iterations:
        return None if iters is None else iters * batch_size
    return samples


def _one_warmup(fraction: float | None, samples: float | None, tokens: int | None) -> None:
    """Refuse a warm-up that is given twice."""
    given = {"--lr-warmup-fraction": fraction, "--lr-warmup-iters/-samples": samples, "--lr-warmup-tokens": tokens}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ScheduleError(f"the warm-up is given by {' and by '.join(names)}; give one")
    if fraction is not None and not 0.0 <= fraction < 1.0:
        raise ScheduleError(f"--lr-warmup-fraction is {fraction}; it must be at least 0 and less than 1")


def _keys(unit: Unit) -> dict[str, str]:
    """Megatron's name in a checkpoint -> our field. Those after `lr_warmup_init` are unknown to Megatron."""
    length = "tokens" if unit == "tokens" else "steps"
    return {
        "max_lr": "max_lr",
        "min_lr": "min_lr",
        "lr_decay_style": "style",
        f"lr_warmup_{length}": "warmup",
        f"lr_decay_{length}": "decay",
        "start_wd": "start_wd",
        "end_wd": "end_wd",
        "wd_incr_style": "wd_style",
        "wd_incr_steps": "wd_incr_samples",
        "lr_warmup_init": "init_lr",
        "lr_wsd_decay_style": "wsd_style",
        f"lr_wsd_decay_{length}": "wsd_decay",
    }


def schedule_state(schedule: LrSchedule, position: SchedulePosition) -> dict[str, Any]:
    """What a checkpoint stores, under Megatron's names (`num_steps` counts samples)."""
    values = {name: getattr(schedule, field) for name, field in _keys(schedule.unit).items()}
    return {**values, "num_steps": position.samples, "num_tokens": position.tokens}


def load_schedule(
    schedule: LrSchedule, state: Mapping[str, Any], *, override: bool = False, use_checkpoint: bool = False
) -> tuple[LrSchedule, SchedulePosition]:
    """Continue a schedule from a checkpoint.

    Args:
        schedule: the schedule that the flags of this run describe.
        state: what `schedule_state` returned, or Megatron's dictionary of the same names.
        override: `--override-opt_param-scheduler`: keep `schedule`.
        use_checkpoint: `--use-checkpoint-opt_param-scheduler`: take the schedule of the checkpoint.

    Returns:
        The schedule to go on with and the position to go on from.

    Raises:
        ScheduleError: the two schedules differ and neither switch says which one holds; or both switches are given.
    """
    if override and use_checkpoint:
        raise ScheduleError(
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other; give one"
        )
    position = SchedulePosition(int(state["num_steps"]), int(state.get("num_tokens") or 0))
    unit: Unit = "tokens" if state.get("lr_decay_tokens") is not None else "samples"
    saved = {field: state[name] for name, field in _keys(unit).items() if name in state}
    if override:
        return schedule, position
    if use_checkpoint:
        return replace(schedule, unit=unit, **saved), position
    differences = [
        f"{name}: {getattr(schedule, field)} now, {state[name]} in the checkpoint"
        for name, field in _keys(unit).items()
        if name in state and getattr(schedule, field) != state[name]
    ]
    if unit != schedule.unit:
        differences.insert(0, f"unit of the schedule: {schedule.unit} now, {unit} in the checkpoint")
    if differences:
        raise ScheduleError(
            "the learning-rate schedule differs from the checkpoint's:\n  "
            + "\n  ".join(differences)
            + "\ngive --override-opt_param-scheduler to use the values of this run, or "
            "--use-checkpoint-opt_param-scheduler to use those of the checkpoint"
        )
    return schedule, position
