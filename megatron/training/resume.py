"""Continuing from a checkpoint: weights, optimizer, schedule and position, or a part of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron.checkpoint import CheckpointError, holds_checkpoint, on_first_rank, read_record
from megatron.checkpoint.formats import FORMATS
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parser import ConfigError
from megatron.config.run import RunConfig, parse
from megatron.training.checkpoint_args import read_settings
from megatron.training.engine import Engine, LoadSource
from megatron.training.lr import LrSchedule, SchedulePosition, load_schedule
from megatron.training.pretrained import pretrained_kind
from megatron.training.report import Printer
from megatron.training.state import TrainState
from megatron.training.watchdog import Watchdog


@dataclass(frozen=True)
class Resumed:
    """Where the run goes on from; `iteration` of `state` is 0 for a new run."""

    state: TrainState
    schedule: LrSchedule


def continuing(config: RunConfig, env: Mapping[str, str], log: Printer) -> RunConfig:
    """The settings with `--auto-resume` carried out, and with the global batch size of the checkpoint to go on from.

    The default of `--global-batch-size` grows with the number of processes, which may be another one at each start.
    Called by all ranks.

    Args:
        config: the settings.
        env: the launcher's, as for `parse`.
        log: told about a batch size that is taken over.

    Raises:
        CheckpointError: the ranks of this run cannot share that batch evenly, and `--global-batch-size` is not given.
    """
    settings, training = effective(config.checkpoint), config.training
    config = replace(config, checkpoint=settings)
    asked = "global_batch_size" in config.given or training.scheduler_batch_size
    begins = settings.load is None or settings.finetune or settings.reset_iteration or pretrained_kind(settings.load)
    saved = None if asked or begins else _saved_batch_size(settings)
    if saved in (None, training.global_batch_size):
        return config
    words = [*config.to_flags(), "--global-batch-size", str(saved)]
    try:
        again = parse(words, env, read_record=read_settings)
    except ConfigError as error:
        raise CheckpointError(
            f"{settings.load} was trained with {saved} samples per step, and no --global-batch-size is given: {error}"
        ) from error
    log(f"the global batch size is {saved}, as in the checkpoint (--global-batch-size is not given)")
    return replace(again, checkpoint=settings)


def _saved_batch_size(settings: CheckpointConfig) -> int | None:
    """The global batch size of the run that wrote what `--load` names; None if it is not known."""
    assert settings.load is not None
    fallback = settings.load_fallback and settings.ckpt_step is None
    record = read_record(settings.load, iteration=settings.ckpt_step, fallback=fallback)
    return None if record is None else record.run["settings"].get("global_batch_size")


def effective(settings: CheckpointConfig) -> CheckpointConfig:
    """The settings with `--auto-resume` carried out; called by all ranks, which follow what the first one sees."""
    if not settings.auto_resume or not on_first_rank(lambda: holds_checkpoint(settings.save or "")):
        return settings
    return latest_of_run(settings)


def latest_of_run(settings: CheckpointConfig) -> CheckpointConfig:
    """Settings that go on from the newest checkpoint that the run itself has written."""
    return replace(
        settings,
        load=settings.save,
        ckpt_step=None,
        finetune=False,
        no_load_optim=False,
        no_load_lr_state=False,
        reset_iteration=False,
        exit_on_missing_checkpoint=True,
    )


def resume(
    engine: Engine,
    schedule: LrSchedule,
    settings: CheckpointConfig,
    optimizer: OptimizerConfig,
    log: Printer,
    watchdog: Watchdog,
) -> Resumed:
    """Load what `--load` names into the engine; called by all ranks.

    Raises:
        CheckpointError: there is no checkpoint and `--exit-on-missing-checkpoint` was given, or it cannot be loaded.
        ScheduleError: the schedule differs from the checkpoint's and no flag says which one holds.
    """
    fresh = Resumed(TrainState(), schedule)
    if settings.load is None:
        return fresh
    if kind := pretrained_kind(settings.load):
        log(f" took the weights of {settings.load} ({FORMATS[kind].title}); training begins at iteration 0")
        return fresh
    weights_only = settings.finetune or bool(settings.no_load_optim)
    source = LoadSource(
        root=settings.load,
        iteration=settings.ckpt_step,
        verify=settings.load_verify,
        # Whoever names a checkpoint does not mean another one.
        fallback=settings.load_fallback and settings.ckpt_step is None,
        progress=watchdog.progress,
    )
    with watchdog.watched("loading", computes=False):
        loaded = engine.load(source, optimizer=not weights_only, log=log)
    if loaded is None:
        if settings.exit_on_missing_checkpoint:
            raise CheckpointError(f"--load {settings.load}: there is no checkpoint (--exit-on-missing-checkpoint)")
        log(f"WARNING: could not find the metadata file {settings.load}/latest_checkpointed_iteration.txt")
        log("    will not load any checkpoints and will start from random")
        return fresh
    if settings.finetune:
        return fresh
    saved = loaded.progress["opt_param_scheduler"]
    position = SchedulePosition()
    if not settings.no_load_lr_state:
        schedule, position = load_schedule(
            schedule,
            saved,
            override=optimizer.override_opt_param_scheduler,
            use_checkpoint=optimizer.use_checkpoint_opt_param_scheduler,
        )
    if settings.reset_iteration:
        return Resumed(TrainState(schedule=position), schedule)
    return Resumed(TrainState.from_progress(loaded.progress, position), schedule)
