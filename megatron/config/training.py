"""Settings of the training loop: batches, length of the run, evaluation, ways to stop, recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option, resolved


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop. `train_iters` is always known; `train_samples` is None unless the run is measured in samples."""

    micro_batch_size: int = resolved("Samples that one rank computes at once.", minimum=1)
    global_batch_size: int = resolved(
        "Samples of one step, over all ranks. Default: that of the checkpoint that a run goes on from, or micro-batch "
        "size times data-parallel size.",
        minimum=1,
    )
    rampup_batch_size: tuple[str, ...] | None = option(
        None, "Growing batch: first size, increment and number of samples over which it grows, in samples.", many="*"
    )
    scheduler_batch_size: tuple[int, ...] | None = option(
        None, "Global batch size of every part of the run, in samples.", many="+", minimum=1
    )
    batch_sched_samples: tuple[int, ...] | None = option(
        None, "Where every part of the run begins, in samples; the first is 0.", many="+", minimum=0
    )
    scheduler_seq_length: tuple[int, ...] | None = option(
        None,
        "Length of the samples of every part of the run, in tokens: --seq-length, or a part of it that samples of that "
        "length are cut into.",
        many="+",
        minimum=1,
    )
    eval_micro_batch_size: int = resolved(
        "Samples that one rank evaluates at once. Default: --micro-batch-size.", minimum=1
    )
    train_iters: int = resolved(
        "Length of the run, in iterations. Default: as many as --train-samples or --train-tokens are enough for.",
        minimum=0,
    )
    train_samples: int | None = option(None, "Length of the run, in samples, instead of iterations.", minimum=1)
    train_tokens: int | None = option(
        None, "Stop after this number of tokens, alone or beside the other two.", minimum=1
    )
    iterations_to_skip: tuple[int, ...] = option(
        (), "Iterations, counted from 1, whose data is read but not trained on."
    )
    seed: int = option(1234, "Seed (a number without unit) of initial weights, data order and dropout.", minimum=0)

    eval_iters: int = option(100, "Length of an evaluation, in iterations; -1 is the whole set.", minimum=-1)
    eval_interval: int = option(1000, "Time between evaluations, in iterations.", minimum=1)
    skip_train: bool = option(False, "Only evaluate.", aliases=("--eval-only",))
    exit_interval: int | None = option(
        None, "Stop when the iteration is a multiple of this number of iterations.", minimum=1
    )
    stop_after_num_samples: int | None = option(
        None, "Save and stop when this number of samples has been trained on.", minimum=1
    )
    exit_duration_in_mins: int | None = option(None, "Save and stop after this time, in minutes.", minimum=1)
    exit_before_job_end_in_mins: int | None = option(
        None, "Save and stop this time before Slurm ends the job, in minutes.", minimum=1
    )
    exit_signal_handler: bool = option(False, "Save and stop when the signal arrives.")
    exit_signal: Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"] = option(
        "SIGTERM", "Signal of --exit-signal-handler."
    )
    kill_switch_file: str | None = option(
        None, "Save and stop when this file appears.", aliases=("--kill-switch-path",)
    )
    on_nan: Literal["skip", "stop", "rollback"] = option(
        "skip",
        "What a loss or gradients that are not finite lead to: the step is left out, the run ends, or it goes back to "
        "the last checkpoint and leaves the iteration out.",
    )
    on_loss_spike: Literal["skip", "stop", "rollback"] | None = option(
        None, "The same for a loss far above the ones before. Default: it is trained on like any other."
    )
    loss_spike_factor: float = option(
        2.0, "A spike is a loss above the median of the losses before times this factor.", minimum=1
    )
    loss_spike_window: int = option(
        100, "Iterations of which the median is taken, and before which there is no spike.", minimum=1
    )
    hang_timeout: int | None = option(
        None,
        "End all ranks, and say where each one is, when none gets further for this number of seconds, with an "
        "iteration, a step of an evaluation, or a checkpoint. Default: --distributed-timeout-minutes or ten times the "
        "longest iteration; the first one has no limit.",
        minimum=1,
    )
    manual_gc: bool = option(False, "Collect Python garbage at fixed iterations instead of at any moment.")
    manual_gc_interval: int = option(
        0, "Iterations between garbage collections; 0 collects only around evaluations.", minimum=0
    )

    recompute_granularity: Literal["full", "selective", "mlp"] | None = option(
        None,
        "What is recomputed in the backward pass: whole layers, attention (selective) or the feed-forward block (mlp).",
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None, "With full: every group of layers, or the first layers of each stage one by one."
    )
    recompute_num_layers: int = option(1, "Layers in a group (uniform), or layers recomputed (block).", minimum=1)
    recomputation_layer_num: tuple[int, ...] | None = option(
        None,
        "Layers that are recomputed in each pipeline stage, its first ones: one number for every stage. Stands for "
        "--recompute-granularity full --recompute-method block.",
        minimum=0,
    )
    checkpoint_in_cpu: bool = option(False, "With full: keep the inputs of recomputed layers in the host's memory.")
    cpu_offloading_num_layers: int = option(
        0, "Layers of each stage, its first ones, that keep their activations in the host's memory.", minimum=0
    )
