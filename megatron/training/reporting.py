"""From settings to a reporter: which rank writes what, and where."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.config.architecture import Architecture
from megatron.config.run import RunConfig
from megatron.model.recompute import recompute_plan
from megatron.training.flops import TrainingFlops, training_flops
from megatron.training.metrics import MetricsFile
from megatron.training.progress import ProgressBar, progress_bar
from megatron.training.report import Printer, Printers
from megatron.training.reporter import Reporter, ReportSettings, Writers
from megatron.training.setup import Session
from megatron.training.tensorboard import Curves, TensorBoardWriter, WandbWriter
from megatron.training.timers import Timers


def build_reporter(
    config: RunConfig, session: Session, arch: Architecture, timers: Timers, record: Mapping[str, Any], resumed_at: int
) -> Reporter:
    """The reporter of this rank.

    Args:
        config: the settings.
        session: device and groups.
        arch: the model.
        timers: of this rank.
        record: what describes the run, for W&B and the metrics file.
        resumed_at: iteration that the run goes on from.
    """
    groups = session.groups
    rank, world_size = groups.world.rank, groups.world.size
    bar = progress_bar(config.logging.progress_bar and rank == world_size - 1, config.training.train_iters, resumed_at)
    printers = Printers.of(rank, world_size, bar.write) if bar is not None else session.printers
    return Reporter(
        settings=_settings(config, session, arch),
        printers=printers,
        memory_printer=Printer(groups.place.dp == 0 and groups.place.cp == 0),
        writers=_writers(config, session, record, resumed_at, bar),
        timers=timers,
        rank=rank,
        memory=session.accelerator.memory_stats,
        gather=lambda values: _gather(values, world_size),
    )


def _settings(config: RunConfig, session: Session, arch: Architecture) -> ReportSettings:
    logging = config.logging
    return ReportSettings(
        interval=logging.log_interval,
        train_iters=config.training.train_iters,
        world_size=session.groups.world.size,
        data_parallel_size=session.groups.dp.size,
        parameters=arch.num_parameters(),
        flops=functools.cache(functools.partial(run_flops, config, arch)),
        peak_flops=session.accelerator.peak_flops(getattr(torch, config.precision.params_dtype)),
        curves=Curves(
            timers=logging.log_timers_to_tensorboard,
            batch_size=logging.log_batch_size_to_tensorboard,
            learning_rate=logging.log_learning_rate_to_tensorboard,
            loss_scale=logging.log_loss_scale_to_tensorboard,
            validation_ppl=logging.log_validation_ppl_to_tensorboard,
            memory=logging.log_memory_to_tensorboard,
            world_size=logging.log_world_size_to_tensorboard,
        ),
        curve_interval=logging.tensorboard_log_interval,
        throughput=logging.log_throughput,
        memory_interval=logging.log_memory_interval,
        timer_level=logging.timing_log_level,
        timer_option=logging.timing_log_option,
    )


def run_flops(config: RunConfig, arch: Architecture, seq_length: int) -> TrainingFlops:
    """Operations of a sample of `seq_length` tokens, with what the run recomputes."""
    training = config.training
    layers = arch.num_layers
    if training.recompute_method == "block":
        layers = recompute_plan(vars(training)).layers_again(config.parallel.pipeline_stage_layers)
    return training_flops(
        arch, seq_length, recompute=training.recompute_granularity or "none", recomputed_layers=layers
    )


def _writers(
    config: RunConfig, session: Session, record: Mapping[str, Any], resumed_at: int, bar: ProgressBar | None
) -> Writers:
    """The writers, on the last rank, which is the one that prints the losses."""
    logging, groups = config.logging, session.groups
    writers = Writers(bar=bar)
    if groups.world.rank != groups.world.size - 1:
        return writers
    if logging.log_json is not None:
        about = {"layout": layout_name(config), "device": session.accelerator.name}
        writers.metrics = MetricsFile(Path(logging.log_json), resumed_at, about)
    if logging.tensorboard_dir is not None:
        writers.tensorboard = TensorBoardWriter(Path(logging.tensorboard_dir), logging.tensorboard_queue_size)
    if logging.wandb_project:
        writers.wandb = WandbWriter(
            logging.wandb_project,
            entity=logging.wandb_entity,
            name=logging.wandb_exp_name,
            directory=Path(logging.wandb_save_dir) if logging.wandb_save_dir else None,
            config=record["settings"],
        )
    return writers


def layout_name(config: RunConfig) -> str:
    """The layout in a few letters, such as "TP2 PP4 DP2 SP 1f1b, stage 1"."""
    parallel = config.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "DP": parallel.data_parallel_size,
    }
    name = " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "1 process"
    if parallel.sequence_parallel:
        name += " SP"
    if parallel.pipeline_model_parallel_size > 1:
        name += f" {parallel.pipeline_schedule}"
    if config.deepspeed.deepspeed:
        return f"{name}, DeepSpeed ZeRO-{parallel.zero_stage}"
    return f"{name}, stage {parallel.zero_stage_native}" if parallel.data_parallel_size > 1 else name


def _gather(values: list[float], world_size: int) -> list[list[float]]:
    if world_size == 1:
        return [values]
    rows: list[list[float]] = [[]] * world_size
    dist.all_gather_object(rows, values)
    return rows
