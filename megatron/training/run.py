"""A whole run: from the settings to the last checkpoint."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from datetime import datetime
from typing import Any

import torch
import torch.distributed as dist

import megatron
from megatron import checkpoint
from megatron.config import dump
from megatron.config.architecture import Architecture
from megatron.config.phases import phases
from megatron.config.run import RunConfig
from megatron.mpu.collectives import MAX, all_reduce
from megatron.mpu.schedule import describe
from megatron.training.anomalies import AnomalyWatch
from megatron.training.build import build_engine, stage_layout
from megatron.training.data import build_data
from megatron.training.loop import LoopSettings, Restart, Training
from megatron.training.lr import LrSchedule, build_schedule
from megatron.training.microbatches import BatchPlan, RampUp
from megatron.training.observing import build_observer, build_probes
from megatron.training.pretrained import check_export, export
from megatron.training.report import dated
from megatron.training.reporting import build_reporter
from megatron.training.resume import continuing, latest_of_run, resume
from megatron.training.safety import anomaly_rules, exit_rules, save_target, watchdog
from megatron.training.setup import Session, start
from megatron.training.timers import Timers
from megatron.training.vocabulary import build_vocabulary
from megatron.training.watchdog import Watchdog


def run(config: RunConfig) -> None:
    """Train, evaluate and save as the settings say. Called by all ranks.

    Raises:
        ValueError: of a kind that this package defines, for whatever the user can put right.
    """
    started = time.monotonic()
    session = start(config)
    say = session.printers.rank0
    config = continuing(config, os.environ, say)
    for line in dump.lines(config):
        say(line)
    with watchdog(config, session) as dog:
        _run(config, session, build_training(config, session, started, dog))


def _run(config: RunConfig, session: Session, training: Training) -> None:
    say = session.printers.rank0
    say("done with setup ...")
    say(dated("before the start of training step", datetime.now()))
    leaving = None
    try:
        if config.training.skip_train:
            say("skipping training (--skip-train is on) ...")
        else:
            say("training ...")
            leaving = training.train()
            say(dated("after training is done", datetime.now()))
            if leaving is None:
                _export(config, training, session)
        if leaving is None and training.settings.eval_iters:
            training.evaluate("validation", final=True)
            training.evaluate("test", final=True)
    finally:
        training.reporter.close()


def build_training(config: RunConfig, session: Session, started: float, dog: Watchdog) -> Training:
    """Everything a run needs, with the checkpoint of `--load` restored."""
    say = session.printers.rank0
    timers = Timers(
        config.logging.timing_log_level,
        synchronize=session.accelerator.synchronize,
        barrier=dist.barrier if config.logging.barrier_with_L1_time else None,
    )
    tokenizer, arch = build_vocabulary(config, say)
    if config.checkpoint.save is not None:
        checkpoint.check_writable(config.checkpoint.save)
    if config.checkpoint.save_hf is not None:
        check_export(config.checkpoint.save_hf)
    plan = batch_plan(config)
    say(plan.describe())
    if (layout := stage_layout(config)).ranks > 1:
        say(describe(config.parallel.pipeline_schedule, layout, plan.final.microbatches))
    probes = build_probes(config, session)
    engine = build_engine(config, session, arch, probes)
    say(f" > number of parameters: {arch.num_parameters()} (whole model, without vocabulary padding)")
    with timers("load-checkpoint"):
        resumed = resume(engine, lr_schedule(config), config.checkpoint, config.optimizer, say, dog)
    record = run_record(config, session, arch)
    say("> building train, validation, and test datasets ...")
    data = build_data(config, session, tokenizer, plan, resumed.state, say)
    reporter = build_reporter(config, session, arch, timers, record, resumed.state.iteration)

    def go_back() -> Restart | None:
        if config.checkpoint.save is None or not _has_saved(config.checkpoint.save):
            return None
        again = resume(engine, lr_schedule(config), latest_of_run(config.checkpoint), config.optimizer, say, dog)
        return Restart(again.state, again.schedule, build_data(config, session, tokenizer, plan, again.state, say))

    return Training(
        engine=engine,
        data=data,
        schedule=resumed.schedule,
        plan=plan,
        settings=loop_settings(config),
        reporter=reporter,
        timers=timers,
        printers=reporter.printers,
        exits=exit_rules(config, started, os.environ),
        all_reduce_max=lambda value: _all_reduce_max(value, session),
        rank=session.groups.world.rank,
        save_target=save_target(config, say, dog.progress),
        go_back=go_back,
        anomalies=AnomalyWatch(anomaly_rules(config)),
        watchdog=dog,
        run_record=record,
        started=started,
        profile=build_observer(config, session, probes, resumed.state.iteration),
        state=resumed.state,
        saved_at=resumed.state.iteration or None,
    )


def batch_plan(config: RunConfig) -> BatchPlan:
    """Global batch size over the run."""
    training = config.training
    return BatchPlan(
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_size=config.parallel.data_parallel_size,
        ramp_up=RampUp.parse(training.rampup_batch_size) if training.rampup_batch_size else None,
        phases=phases(
            training.scheduler_batch_size,
            training.batch_sched_samples,
            training.scheduler_seq_length,
            config.data.seq_length,
        ),
    )


def lr_schedule(config: RunConfig) -> LrSchedule:
    """Learning rate and weight decay over the run."""
    training, optimizer = config.training, config.optimizer
    by_samples = training.train_samples is not None
    return build_schedule(
        train_iters=None if by_samples else max(1, training.train_iters),
        train_samples=training.train_samples,
        global_batch_size=training.global_batch_size,
        seq_length=config.data.seq_length,
        **{name: getattr(optimizer, name) for name in _SCHEDULE_SETTINGS},
    )


_SCHEDULE_SETTINGS = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples", "lr_decay_tokens"),
    *("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens", "lr_warmup_init"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)


def loop_settings(config: RunConfig) -> LoopSettings:
    """When things happen."""
    training = config.training
    return LoopSettings(
        train_iters=training.train_iters,
        seq_length=config.data.seq_length,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        save_interval=config.checkpoint.save_interval,
        skip=frozenset(training.iterations_to_skip),
        gc_interval=training.manual_gc_interval if training.manual_gc else None,
        log_params_norm=config.logging.log_params_norm,
    )


def _has_saved(folder: str) -> bool:
    return checkpoint.on_first_rank(lambda: checkpoint.holds_checkpoint(folder))


def run_record(config: RunConfig, session: Session, arch: Architecture) -> dict[str, Any]:
    """What is being trained and with what, for checkpoints and metrics; JSON."""
    return {
        "settings": config.as_namespace(),
        "architecture": dataclasses.asdict(arch),
        "ops": list(session.op_lines),
        "layout": dataclasses.asdict(session.groups.topology) | {"device": session.accelerator.name},
        "versions": {
            "megatron": megatron.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _export(config: RunConfig, training: Training, session: Session) -> None:
    """Write the last checkpoint as a Hugging Face folder, if `--save-hf` asks for it."""
    settings = config.checkpoint
    if settings.save_hf is None or settings.save is None or session.groups.world.rank:
        return
    if training.saved_at is None:
        raise checkpoint.CheckpointError(f"--save-hf {settings.save_hf}: the run has written no checkpoint")
    dtype = getattr(torch, config.precision.params_dtype)
    export(settings.save, training.saved_at, settings.save_hf, dtype, session.printers.rank0)


def _all_reduce_max(value: int, session: Session) -> int:
    world = session.groups.world
    if world.size == 1:
        return value
    return int(all_reduce(torch.tensor(value, device=session.device), world, MAX).item())
