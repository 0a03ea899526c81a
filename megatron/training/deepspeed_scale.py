"""The loss scale of DeepSpeed's optimizers in the terms of `LossScale`, which checkpoints hold."""

from __future__ import annotations

from typing import Any

from megatron.training.loss_scale import LossScale


def read_scale(optimizer: Any) -> LossScale:
    """The loss scale that DeepSpeed has arrived at.

    Args:
        optimizer: what `deepspeed.initialize` returned.
    """
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is None:
        return LossScale.static(1.0)
    if not scaler.dynamic:
        return LossScale.static(float(scaler.cur_scale))
    window = int(scaler.scale_window)
    clean = scaler.cur_iter - scaler.last_overflow_iter - 1
    return LossScale(
        value=float(scaler.cur_scale),
        minimum=float(scaler.min_scale),
        window=window,
        hysteresis=scaler.delayed_shift,
        # DeepSpeed counts on when the scale has grown, which it does at the step after each full window.
        clean_steps=clean if clean <= window else (clean - 1) % window + 1,
        overflows_left=scaler.cur_hysteresis,
    )


def write_scale(optimizer: Any, scale: LossScale) -> None:
    """Let DeepSpeed go on with a loss scale; one that never changes is left as it is."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return
    scaler.cur_scale = scale.value
    scaler.cur_iter, scaler.last_overflow_iter = scale.clean_steps, -1
    scaler.cur_hysteresis = max(1, scale.overflows_left)
