"""From settings to what keeps a run safe: its checkpoints, the ways to end it early, who watches over it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron import checkpoint
from megatron.config.run import RunConfig
from megatron.training.anomalies import AnomalyRules
from megatron.training.engine import SaveTarget
from megatron.training.setup import Session, SetupError
from megatron.training.signals import ExitRules, parse_signal
from megatron.training.watchdog import Watchdog

_SLURM_END = "SLURM_JOB_END_TIME"


def exit_rules(config: RunConfig, started: float, env: Mapping[str, str]) -> ExitRules:
    """What ends the run early.

    Args:
        config: the settings.
        started: `time.monotonic()` at the start of the program.
        env: where Slurm says when the job ends.
    """
    training = config.training
    seconds = time.monotonic() - started
    left = minutes_left(training.exit_before_job_end_in_mins, env)
    limits = [training.exit_duration_in_mins, None if left is None else left + seconds / 60.0]
    return ExitRules(
        on_signal=parse_signal(training.exit_signal) if training.exit_signal_handler else None,
        after_minutes=min((limit for limit in limits if limit is not None), default=None),
        every=training.exit_interval,
        kill_switch=Path(training.kill_switch_file) if training.kill_switch_file else None,
        after_samples=training.stop_after_num_samples,
    )


def minutes_left(before_end: float | None, env: Mapping[str, str]) -> float | None:
    """Minutes from now until a run ends that ends some time before its job; None: it does not.

    Args:
        before_end: `--exit-before-job-end-in-mins`.
        env: where Slurm says when the job ends, in seconds since 1970.

    Raises:
        SetupError: Slurm does not say it.
    """
    if before_end is None:
        return None
    end = env.get(_SLURM_END, "")
    if not end.isdecimal():
        raise SetupError(
            f"--exit-before-job-end-in-mins {before_end}: {_SLURM_END} is {end or 'not set'!r}, so the end of the "
            "job is not known; use --exit-duration-in-mins"
        )
    return (int(end) - time.time()) / 60.0 - before_end


def anomaly_rules(config: RunConfig) -> AnomalyRules:
    """What is done about steps that went wrong."""
    training = config.training
    return AnomalyRules(
        on_nan=training.on_nan,
        on_spike=training.on_loss_spike,
        spike_factor=training.loss_spike_factor,
        spike_window=training.loss_spike_window,
    )


def watchdog(config: RunConfig, session: Session) -> Watchdog:
    """What ends a run that stands still."""
    world = session.groups.world
    return Watchdog(
        rank=world.rank,
        world_size=world.size,
        asked=config.training.hang_timeout,
        collectives=60.0 * config.parallel.distributed_timeout_minutes,
        store=dist.distributed_c10d._get_default_store() if world.size > 1 else None,
    )


def save_target(config: RunConfig, say: Callable[[str], None], progress: Callable[[], None]) -> SaveTarget | None:
    """Where checkpoints go; None if the run is not saved. Called by all ranks; writing calls `progress`."""
    settings = config.checkpoint
    if settings.save is None:
        return None
    # A thread that writes must not share a group with the training.
    background = settings.async_save and dist.get_world_size() > 1
    saver = checkpoint.Saver(
        settings.save,
        checkpoint.SaveSettings(
            keep_last=settings.keep_last,
            retain_interval=settings.save_retain_interval,
            verify=settings.verify_checkpoint,
            background=settings.async_save,
        ),
        group=dist.new_group(backend="gloo", timeout=_timeout(config)) if background else None,
        log=say,
        progress=progress,
    )
    return SaveTarget(saver=saver, optimizer=not settings.no_save_optim, heal=settings.heal_replica_drift)


def _timeout(config: RunConfig) -> timedelta:
    return timedelta(minutes=config.parallel.distributed_timeout_minutes)
