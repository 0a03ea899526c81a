"""Settings of saving and loading."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema import option


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run is saved and where it continues from."""

    save: str | None = option(None, "Directory that checkpoints are written to.")
    save_interval: int | None = option(
        None, "Time between checkpoints, in iterations.", aliases=("--persistent-save-interval",), minimum=1
    )
    save_retain_interval: int | None = option(
        None, "Of old checkpoints keep those at multiples of this number of iterations.", minimum=1
    )
    keep_last: int | None = option(
        None, "Number of newest checkpoints to keep. Default: all.", aliases=("--save-retain",), minimum=1
    )
    async_save: bool = option(
        False, "Write checkpoints while training goes on: it waits only until its state is copied."
    )
    verify_checkpoint: bool = option(
        False,
        "Write no checkpoint that is not finite or of which ranks hold copies that differ, and read every file back "
        "before it counts as written.",
    )
    heal_replica_drift: bool = option(
        False, "Before a checkpoint give ranks whose copy of a parameter differs from that of most the copy of most."
    )
    save_hf: str | None = option(
        None, "Folder to write the trained model to, as Hugging Face stores it, from the last checkpoint in --save."
    )
    no_save_optim: bool | None = option(None, "Save no optimizer state.")
    load: str | None = option(
        None,
        "Directory that a checkpoint is read from, or a Hugging Face folder whose weights training begins with.",
    )
    ckpt_step: int | None = option(None, "Iteration whose checkpoint is loaded. Default: the latest.", minimum=0)
    no_load_optim: bool | None = option(None, "Do not load optimizer state.")
    no_load_lr_state: bool = option(False, "Do not load the position in the learning-rate schedule.")
    auto_resume: bool = option(
        False, "Go on from the latest checkpoint in --save; without one begin as --load and its family say."
    )
    load_fallback: bool = option(
        True, "Refuse a damaged checkpoint, instead of going on from the one before it.", name="--no-load-fallback"
    )
    load_verify: bool = option(True, "Do not compare the hashes of the files that are loaded.", name="--no-load-verify")
    finetune: bool = option(False, "Load weights alone and begin at iteration 0.")
    reset_iteration: bool = option(
        False, "Begin at iteration 0 and with the first sample, with the loaded weights, optimizer and schedule."
    )
    use_checkpoint_args: bool = option(False, "Take the architecture and the tokenizer from the checkpoint.")
    exit_on_missing_checkpoint: bool = option(False, "Stop when --load holds no checkpoint instead of starting anew.")
