"""Rules about training, number formats, saving and reporting; see `megatron.config.rules` for how they are run."""

from __future__ import annotations

import re
from collections.abc import Callable

Rule = Callable[..., str | None]
Given = frozenset[str]


def batch_divides(
    global_batch_size: int, micro_batch_size: int, data_parallel_size: int, rampup_batch_size: tuple[str, ...] | None
) -> str | None:
    """Every rank computes the same number of micro-batches."""
    share = micro_batch_size * data_parallel_size
    if global_batch_size % share:
        return (
            f"--global-batch-size {global_batch_size}: must be a multiple of {share} = --micro-batch-size "
            f"{micro_batch_size} x data-parallel size {data_parallel_size}"
        )
    numbers = _whole_numbers(rampup_batch_size)
    if rampup_batch_size is not None and (numbers[0] % share or numbers[1] % share if len(numbers) == 3 else False):
        return (
            f"--rampup-batch-size {' '.join(rampup_batch_size)}: the first size and the increment must be multiples of "
            f"{share} = --micro-batch-size x data-parallel size"
        )
    return None


def rampup_is_well_formed(rampup_batch_size: tuple[str, ...] | None, global_batch_size: int) -> str | None:
    """The batch grows from its first size to the global batch size in equal steps."""
    if rampup_batch_size is None:
        return None
    text = f"--rampup-batch-size {' '.join(rampup_batch_size)}"
    numbers = _whole_numbers(rampup_batch_size)
    if len(rampup_batch_size) != 3 or len(numbers) != 3 or min(numbers[:2]) < 1:
        return f"{text}: must be three whole numbers: first size, increment, samples over which it grows"
    start, increment, _ = numbers
    if start > global_batch_size or (global_batch_size - start) % increment:
        return f"{text}: must reach --global-batch-size {global_batch_size} from {start} in steps of {increment}"
    return None


def _whole_numbers(words: tuple[str, ...] | None) -> list[int]:
    """The words that are whole numbers of at least 0, written as Python allows (5_000_000)."""
    return [int(word) for word in words or () if re.fullmatch(r"[0-9]+(_[0-9]+)*", word)]


def length_is_given_once(skip_train: bool, given: Given) -> str | None:
    """A run is measured in iterations or in samples."""
    if {"train_iters", "train_samples"} <= given:
        return "--train-iters and --train-samples: give one of them"
    if not {"train_iters", "train_samples", "train_tokens"} & given and not skip_train:
        return "the length of the run is missing: give --train-iters, --train-samples or --train-tokens"
    return None


def rampup_counts_samples(rampup_batch_size: tuple[str, ...] | None, given: Given) -> str | None:
    """With a growing batch an iteration is no unit of length."""
    if rampup_batch_size is not None and "train_iters" in given:
        return "--train-iters: with --rampup-batch-size give --train-samples instead"
    return None


def schedule_has_the_unit_of_the_run(train_samples: int | None, given: Given) -> str | None:
    """Lengths of the schedule are in the unit of the length of the run."""
    by_samples = train_samples is not None
    wrong, right = ("iters", "samples") if by_samples else ("samples", "iters")
    flags = [
        f"--{name}-{wrong}"
        for name in ("lr-decay", "lr-warmup", "lr-wsd-decay")
        if f"{name}-{wrong}".replace("-", "_") in given
    ]
    if flags:
        return f"{', '.join(flags)}: the run is measured in {right}; give the length in the same unit"
    return None


def warmup_is_given_once(
    lr_warmup_fraction: float | None, lr_warmup_iters: int, lr_warmup_samples: int, lr_warmup_tokens: int | None
) -> str | None:
    """The warm-up is a fraction or a length."""
    lengths = {
        "--lr-warmup-fraction": lr_warmup_fraction,
        "--lr-warmup-iters": lr_warmup_iters,
        "--lr-warmup-samples": lr_warmup_samples,
        "--lr-warmup-tokens": lr_warmup_tokens,
    }
    used = [flag for flag, value in lengths.items() if value]
    return f"{' and '.join(used)}: give one of them" if len(used) > 1 else None


def rates_are_ordered(lr: float, min_lr: float, lr_warmup_init: float, skip_train: bool) -> str | None:
    """The learning rate rises to its highest value and falls to its lowest."""
    for flag, value in (("--min-lr", min_lr), ("--lr-warmup-init", lr_warmup_init)):
        if value > lr and not skip_train:
            return f"{flag} {value}: must be at most --lr {lr}"
    return None


def wsd_has_a_last_phase(
    lr_decay_style: str, lr_wsd_decay_iters: int | None, lr_wsd_decay_samples: int | None, given: Given
) -> str | None:
    """Warm-up, stable, decay: the length of the decay is not implied by the others."""
    has_length = lr_wsd_decay_iters is not None or lr_wsd_decay_samples is not None
    if lr_decay_style == "WSD" and not has_length:
        return "--lr-decay-style WSD: give --lr-wsd-decay-iters or --lr-wsd-decay-samples"
    if lr_decay_style != "WSD" and (has_length or "lr_wsd_decay_style" in given):
        return f"--lr-wsd-decay-*: only with --lr-decay-style WSD, which is {lr_decay_style}"
    return None


def one_scheduler_wins(override_opt_param_scheduler: bool, use_checkpoint_opt_param_scheduler: bool) -> str | None:
    """The two flags contradict each other."""
    if override_opt_param_scheduler and use_checkpoint_opt_param_scheduler:
        return "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler: give one of them"
    return None


def weight_decay_grows(
    start_weight_decay: float, end_weight_decay: float, weight_decay_incr_style: str, given: Given
) -> str | None:
    """A constant weight decay has one value, a growing one two."""
    both = {"start_weight_decay", "end_weight_decay"}
    values = f"--start-weight-decay {start_weight_decay}, --end-weight-decay {end_weight_decay}"
    if weight_decay_incr_style == "constant" and both & given:
        return f"{values}: only with --weight-decay-incr-style linear or cosine; give --weight-decay"
    if weight_decay_incr_style != "constant" and not both <= given:
        return f"--weight-decay-incr-style {weight_decay_incr_style}: give --start-weight-decay and --end-weight-decay"
    if start_weight_decay > end_weight_decay:
        return f"{values}: the start must be at most the end"
    return None


def host_optimizer_is_for_deepspeed(cpu_optimizer: bool, cpu_torch_adam: bool, deepspeed: bool) -> str | None:
    """The optimizer on the host is DeepSpeed's."""
    if cpu_optimizer and not deepspeed:
        return "--cpu-optimizer: only with --deepspeed; the native engine keeps its state on the devices"
    if cpu_torch_adam and not cpu_optimizer:
        return "--cpu_torch_adam: only with --cpu-optimizer"
    return None


def parameters_elsewhere_are_sharded(remote_device: str, deepspeed: bool, zero_stage: int) -> str | None:
    """DeepSpeed's stage 3 has parameters on the device only while they are used."""
    if remote_device != "none" and not (deepspeed and zero_stage == 3):
        return f"--remote-device {remote_device}: only with --deepspeed and --zero-stage 3"
    return None


def one_half_precision(fp16: bool, bf16: bool) -> str | None:
    """Parameters have one format."""
    return "--fp16 and --bf16: give one of them" if fp16 and bf16 else None


def loss_scale_is_for_float16(fp16: bool, given: Given) -> str | None:
    """Other formats have the range of float32."""
    names = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    flags = ["--" + name.replace("_", "-") for name in names if name in given]
    if flags and not fp16:
        return f"{', '.join(flags)}: only with --fp16"
    return None


def gradients_have_one_format(bf16: bool, grad_reduce_in_bf16: bool, given: Given) -> str | None:
    """Gradients are summed in bfloat16 or in float32."""
    if grad_reduce_in_bf16 and not bf16:
        return "--grad-reduce-in-bf16: only with --bf16"
    if grad_reduce_in_bf16 and "accumulate_allreduce_grads_in_fp32" in given:
        return "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32: give one of them"
    return None


def deepspeed_shards_16_bits(deepspeed: bool, fp16: bool, bf16: bool, zero_stage: int) -> str | None:
    """At stage 0 DeepSpeed's 16-bit optimizer takes a step with no gradient before training: Adam counts one more.

    In float16 it also divides gradients by the loss scale that the loss was not multiplied by (DeepSpeed 0.19.8).
    """
    if deepspeed and (fp16 or bf16) and zero_stage == 0:
        kind = "--fp16" if fp16 else "--bf16"
        return f"--zero-stage 0: with --deepspeed and {kind} it must be 1, 2 or 3; DeepSpeed's stage 0 misguides Adam"
    return None


def deepspeed_has_its_flag(deepspeed: bool, deepspeed_config: str | None) -> str | None:
    """A file for DeepSpeed says nothing to the native engine."""
    if deepspeed_config is not None and not deepspeed:
        return f"--deepspeed_config {deepspeed_config}: only with --deepspeed"
    return None


def export_needs_checkpoints(save: str | None, save_hf: str | None, skip_train: bool) -> str | None:
    """The model is exported from a checkpoint of this run, in which all its parts are together."""
    if save_hf is None:
        return None
    if save is None:
        return f"--save-hf {save_hf}: needs --save, because it is written from the last checkpoint"
    return f"--save-hf {save_hf}: not with --skip-train, which trains nothing" if skip_train else None


def deepspeed_keeps_to_itself(deepspeed: bool, log_num_zeros_in_grad: bool) -> str | None:
    """DeepSpeed has no gradients left to look at after a step."""
    if deepspeed and log_num_zeros_in_grad:
        return "--log-num-zeros-in-grad: only with the native engine, without --deepspeed"
    return None


def hybrid_sharding_divides(
    num_distributed_optimizer_instances: int, data_parallel_size: int, zero_stage_native: int, deepspeed: bool
) -> str | None:
    """Copies of the sharded optimizer share the data-parallel ranks equally."""
    text = f"--num-distributed-optimizer-instances {num_distributed_optimizer_instances}"
    if num_distributed_optimizer_instances > 1 and (deepspeed or zero_stage_native == 0):
        return f"{text}: only with the native engine and --use-distributed-optimizer or --zero-stage 1 to 3"
    if data_parallel_size % num_distributed_optimizer_instances:
        return f"{text}: must divide the data-parallel size {data_parallel_size}"
    return None


def recomputation_is_complete(
    recompute_granularity: str | None, recompute_method: str | None, given: Given
) -> str | None:
    """A method says which layers are recomputed, so it needs layers that are."""
    if recompute_granularity != "full" and recompute_method is not None:
        return f"--recompute-method {recompute_method}: only with --recompute-granularity full"
    if recompute_granularity != "full" and "recompute_num_layers" in given:
        return "--recompute-num-layers: only with --recompute-granularity full"
    return None


def recomputed_layers_are_listed_once(
    recompute_granularity: str | None,
    recompute_method: str | None,
    recomputation_layer_num: tuple[int, ...],
    pipeline_stage_layers: tuple[int, ...],
    given: Given,
) -> str | None:
    """A list has a number for each stage, of layers that are there."""
    text = f"--recomputation-layer-num {' '.join(map(str, recomputation_layer_num))}"
    if (recompute_granularity, recompute_method) != ("full", "block"):
        return f"{text}: only with --recompute-granularity full and --recompute-method block, which can be left out"
    if "recompute_num_layers" in given:
        return f"{text} and --recompute-num-layers: give one of them"
    if len(recomputation_layer_num) != len(pipeline_stage_layers):
        return f"{text}: must be {len(pipeline_stage_layers)} numbers, one for each pipeline stage"
    pairs = enumerate(zip(recomputation_layer_num, pipeline_stage_layers, strict=True))
    wrong = [f"stage {stage} has {layers}, not {asked}" for stage, (asked, layers) in pairs if asked > layers]
    return f"{text}: must be at most the layers of each stage; {wrong[0]}" if wrong else None


def activations_on_the_host_are_kept(
    checkpoint_in_cpu: bool,
    cpu_offloading_num_layers: int,
    recompute_granularity: str | None,
    pipeline_stage_layers: tuple[int, ...],
) -> str | None:
    """Inputs of recomputed layers, or activations of layers that are not: one of them goes to the host."""
    text, full = f"--cpu-offloading-num-layers {cpu_offloading_num_layers}", recompute_granularity == "full"
    if checkpoint_in_cpu and not full:
        return "--checkpoint-in-cpu: only with --recompute-granularity full; take --cpu-offloading-num-layers without"
    if cpu_offloading_num_layers and full:
        return f"{text}: not with --recompute-granularity full; take --checkpoint-in-cpu"
    if cpu_offloading_num_layers > max(pipeline_stage_layers):
        return f"{text}: must be at most {max(pipeline_stage_layers)}, the layers of a stage"
    return None


def recomputed_layers_exist(recompute_num_layers: int, pipeline_stage_layers: tuple[int, ...]) -> str | None:
    """Some pipeline stage has as many layers as are recomputed."""
    layers = max(pipeline_stage_layers)
    if recompute_num_layers > max(layers, 1):
        return f"--recompute-num-layers {recompute_num_layers}: must be at most {layers}, the layers of a stage"
    return None


def saving_has_an_interval(
    save: str | None,
    save_interval: int | None,
    save_retain_interval: int | None,
    keep_last: int | None,
    async_save: bool,
    verify_checkpoint: bool,
    heal_replica_drift: bool,
    auto_resume: bool,
) -> str | None:
    """A directory needs a time, and a time needs a directory."""
    if save is not None and save_interval is None:
        return f"--save {save}: give --save-interval, in iterations"
    others = {
        "--save-retain-interval": save_retain_interval,
        "--keep-last": keep_last,
        "--async-save": async_save,
        "--verify-checkpoint": verify_checkpoint,
        "--heal-replica-drift": heal_replica_drift,
        "--auto-resume": auto_resume,
    }
    used = [flag for flag, value in others.items() if value]
    if used and save is None:
        return f"{', '.join(used)}: only with --save"
    if save_retain_interval is not None and save_interval is not None and save_retain_interval % save_interval:
        return f"--save-retain-interval {save_retain_interval}: must be a multiple of --save-interval {save_interval}"
    return None


def what_is_beside_checkpoints_is_local(
    save: str | None, save_hf: str | None, profile: str | None, tensorboard_dir: str | None
) -> str | None:
    """Only checkpoints can be written to a URL."""
    if save is None or "://" not in save:
        return None
    if save_hf is not None:
        return f"--save {save}: --save-hf reads the checkpoint from a local folder; convert it from there afterwards"
    if profile is not None and tensorboard_dir is None:
        return f"--save {save}: --profile writes files beside it, which must be local; give --tensorboard-dir"
    return None


def auto_resume_needs_the_optimizer(auto_resume: bool, no_save_optim: bool | None) -> str | None:
    """What was saved without its optimizer cannot be continued."""
    return "--auto-resume and --no-save-optim: give one of them" if auto_resume and no_save_optim else None


def loading_has_a_directory(
    load: str | None,
    ckpt_step: int | None,
    finetune: bool,
    reset_iteration: bool,
    use_checkpoint_args: bool,
    exit_on_missing_checkpoint: bool,
) -> str | None:
    """What to load needs the place it is in."""
    flags = {
        "--ckpt-step": ckpt_step is not None,
        "--finetune": finetune,
        "--reset-iteration": reset_iteration,
        "--use-checkpoint-args": use_checkpoint_args,
        "--exit-on-missing-checkpoint": exit_on_missing_checkpoint,
    }
    used = [flag for flag, is_used in flags.items() if is_used]
    if used and load is None:
        return f"{', '.join(used)}: only with --load"
    return None


def stop_signal_is_handled(exit_signal_handler: bool, given: Given) -> str | None:
    """A signal without its handler does nothing."""
    if "exit_signal" in given and not exit_signal_handler:
        return "--exit-signal: only with --exit-signal-handler"
    return None


def rolling_back_needs_checkpoints(
    on_nan: str, on_loss_spike: str | None, save: str | None, no_save_optim: bool | None
) -> str | None:
    """Going back needs something to go back to."""
    used = [f for f, v in (("--on-nan", on_nan), ("--on-loss-spike", on_loss_spike)) if v == "rollback"]
    if used and (save is None or no_save_optim):
        return f"{used[0]} rollback: only with --save and --save-interval, and without --no-save-optim"
    return None


def spikes_have_a_policy(on_loss_spike: str | None, deepspeed: bool, given: Given) -> str | None:
    """What a spike is matters only if it leads to something; DeepSpeed updates weights before it can be told not to."""
    if on_loss_spike is None and (used := {"loss_spike_factor", "loss_spike_window"} & given):
        return f"--{min(used).replace('_', '-')}: only with --on-loss-spike"
    if on_loss_spike == "skip" and deepspeed:
        return "--on-loss-spike skip: not with --deepspeed, which has updated the weights by then; use rollback or stop"
    return None


def garbage_interval_is_manual(manual_gc: bool, manual_gc_interval: int) -> str | None:
    """An interval of collections that Python chooses itself means nothing."""
    if manual_gc_interval and not manual_gc:
        return f"--manual-gc-interval {manual_gc_interval}: only with --manual-gc"
    return None


def skipped_iterations_count_from_one(iterations_to_skip: tuple[int, ...]) -> str | None:
    """Iterations have the numbers that the log shows."""
    wrong = [number for number in iterations_to_skip if number < 1]
    return f"--iterations-to-skip {wrong[0]}: must be at least 1" if wrong else None


def profiled_steps_are_a_range(profile_steps: str) -> str | None:
    """First and last iteration."""
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", profile_steps)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        return f"--profile_steps {profile_steps}: must be first,last with 1 <= first <= last"
    return None


def profiled_ranks_exist(profile_ranks: tuple[int, ...] | None, world_size: int) -> str | None:
    """Ranks count from 0 to the world size."""
    wrong = [rank for rank in profile_ranks or () if rank >= world_size]
    return f"--profile-ranks {wrong[0]}: must be below the world size {world_size}" if wrong else None


def wandb_runs_have_names(wandb_project: str, wandb_exp_name: str, given: Given) -> str | None:
    """A project needs a run, and the other settings need a project."""
    if wandb_project and not wandb_exp_name:
        return f"--wandb-project {wandb_project}: give --wandb-exp-name"
    others = {
        "wandb_entity": "--wandb-entity",
        "wandb_exp_name": "--wandb-exp-name",
        "wandb_save_dir": "--wandb-save-dir",
    }
    used = [flag for name, flag in others.items() if name in given]
    return f"{', '.join(used)}: only with --wandb-project" if used and not wandb_project else None


def operations_are_named(op: tuple[str, ...]) -> str | None:
    """An operation and its implementation."""
    wrong = [item for item in op if not re.fullmatch(r"\w+=[\w.-]+", item)]
    return f"--op {wrong[0]}: must be operation=implementation, such as attention=reference" if wrong else None


def pieces_of_attention_have_operations_of_their_own(op: tuple[str, ...], ring_parallel_size: int) -> str | None:
    """Ranks that hand keys and values around compute attention piece by piece."""
    whole = [item for item in op if item.startswith("attention=")]
    if ring_parallel_size == 1 or not whole:
        return None
    return (
        f"--op {whole[0]}: --context-parallel-size {ring_parallel_size} computes attention in pieces; leave it out or "
        "choose among --op attention_block, attention_block_backward"
    )


RULES: tuple[Rule, ...] = (
    batch_divides,
    rampup_is_well_formed,
    length_is_given_once,
    rampup_counts_samples,
    schedule_has_the_unit_of_the_run,
    warmup_is_given_once,
    rates_are_ordered,
    wsd_has_a_last_phase,
    one_scheduler_wins,
    weight_decay_grows,
    host_optimizer_is_for_deepspeed,
    parameters_elsewhere_are_sharded,
    one_half_precision,
    loss_scale_is_for_float16,
    gradients_have_one_format,
    deepspeed_shards_16_bits,
    deepspeed_has_its_flag,
    export_needs_checkpoints,
    deepspeed_keeps_to_itself,
    hybrid_sharding_divides,
    recomputation_is_complete,
    recomputed_layers_exist,
    recomputed_layers_are_listed_once,
    activations_on_the_host_are_kept,
    saving_has_an_interval,
    auto_resume_needs_the_optimizer,
    what_is_beside_checkpoints_is_local,
    rolling_back_needs_checkpoints,
    spikes_have_a_policy,
    loading_has_a_directory,
    stop_signal_is_handled,
    garbage_interval_is_manual,
    skipped_iterations_count_from_one,
    profiled_steps_are_a_range,
    profiled_ranks_exist,
    wandb_runs_have_names,
    operations_are_named,
    pieces_of_attention_have_operations_of_their_own,
)
