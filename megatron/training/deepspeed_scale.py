"""The loss scale of DeepSpeed's optimizers in the terms of `LossScale`, which checkpoints hold."""

from __future__ import annotations

from typing import Any

from megatron.training.loss_scale import LossScale


def read_scale(optimizer: Any) -> LossScale:
    """The loss scale that DeepSpeed has arrived at.

    Args:
        optimizer: what `deepspeed.initialize` returned.
    """
    scaler = _scaler(optimizer)
    if scaler is None:
        return LossScale.static(1.0)
    if not _is_dynamic(scaler):
        return LossScale.static(float(scaler.cur_scale))
    window = int(scaler.scale_window)
    clean = scaler.cur_iter - scaler.last_overflow_iter - 1
    return LossScale(
        value=float(scaler.cur_scale),
        minimum=float(scaler.min_scale if hasattr(scaler, "min_scale") else scaler.min_loss_scale),
        window=window,
        hysteresis=getattr(scaler, "delayed_shift", 1),
        # DeepSpeed counts on when the scale has grown, which it does at the step after each full window.
        clean_steps=clean if clean <= window else (clean - 1) % window + 1,
        overflows_left=getattr(scaler, "cur_hysteresis", 1),
    )


def write_scale(optimizer: Any, scale: LossScale) -> None:
    """Let DeepSpeed go on with a loss scale; one that never changes is left as it is."""
    scaler = _scaler(optimizer)
    if scaler is None or not _is_dynamic(scaler):
        return
    scaler.cur_scale = scale.value
    scaler.cur_iter, scaler.last_overflow_iter = scale.clean_steps, -1
    if hasattr(scaler, "cur_hysteresis"):
        scaler.cur_hysteresis = max(1, scale.overflows_left)


def _scaler(optimizer: Any) -> Any:
    """The object that keeps the scale: ZeRO's, or that of the 16-bit optimizer of stage 0; None where there is none."""
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _is_dynamic(scaler: Any) -> bool:
    return getattr(scaler, "last_overflow_iter", None) is not None
