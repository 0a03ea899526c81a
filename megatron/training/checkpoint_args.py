"""The settings that a checkpoint was made with (`--use-checkpoint-args`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint import CheckpointError, read_record
from megatron.training.pretrained import pretrained_kind, pretrained_settings


def read_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in the checkpoint that `load` and `ckpt_step` name.

    Raises:
        CheckpointError: no checkpoint is named or there is none.
    """
    root = settings["load"]
    if root is None:
        raise CheckpointError("--use-checkpoint-args needs --load: there is no checkpoint to take the settings from")
    if kind := pretrained_kind(root):
        return pretrained_settings(root, kind, settings["ckpt_step"])
    record = read_record(root, iteration=settings["ckpt_step"])
    if record is None:
        raise CheckpointError(f"--use-checkpoint-args: {root} holds no checkpoint")
    return dict(record.run["settings"])
