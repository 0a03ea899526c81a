"""Settings of what a run reports, and where to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Log lines, TensorBoard, Weights & Biases, profiles."""

    log_interval: int = option(100, "Time between log lines, in iterations.", minimum=1)
    log_params_norm: bool = option(False, "Log the norm of the parameters.")
    log_num_zeros_in_grad: bool = option(False, "Log the number of zeros in the gradient.")
    log_throughput: bool = option(False, "Log the throughput per device.")
    log_memory_interval: int | None = option(None, "Time between reports of memory, in iterations.", minimum=1)
    log_json: str | None = option(None, "File that every log line is appended to as one JSON object.")
    plot_loss: bool = option(False, "Draw the loss curve when the run ends.")
    progress_bar: bool = option(False, "Show a progress bar on a terminal.", opposites=("--no-progress-bar",))
    timing_log_level: int = option(
        0, "Detail of the timers, a level: 0 iterations, 1 main parts, 2 everything.", choices=(0, 1, 2)
    )
    barrier_with_L1_time: bool = option(
        True, "No barrier before the timers of level 1.", "--no-barrier-with-level-1-timing"
    )
    timing_log_option: Literal["max", "minmax", "all"] = option("minmax", "Timers over ranks: longest, range, or all.")
    tensorboard_dir: str | None = option(None, "Directory for TensorBoard.")
    tensorboard_log_interval: int = option(1, "Time between TensorBoard entries, in iterations.", minimum=1)
    tensorboard_queue_size: int = option(1000, "Entries that TensorBoard holds before it writes.", minimum=1)
    log_timers_to_tensorboard: bool = option(False, "Write timers to TensorBoard.")
    log_batch_size_to_tensorboard: bool = option(False, "Write the batch size to TensorBoard.")
    log_learning_rate_to_tensorboard: bool = option(
        True,
        "Do not write the learning rate to TensorBoard.",
        "--no-log-learnig-rate-to-tensorboard",
        aliases=("--no-log-learning-rate-to-tensorboard",),
    )
    log_loss_scale_to_tensorboard: bool = option(
        True, "Do not write the loss factor to TensorBoard.", "--no-log-loss-scale-to-tensorboard"
    )
    log_validation_ppl_to_tensorboard: bool = option(False, "Write the validation perplexity to TensorBoard.")
    log_memory_to_tensorboard: bool = option(False, "Write memory use to TensorBoard.")
    log_world_size_to_tensorboard: bool = option(False, "Write the number of ranks to TensorBoard.")
    wandb_project: str = option("", "Weights & Biases project; without one it is not used.")
    wandb_entity: str = option("", "Weights & Biases user or team.")
    wandb_exp_name: str = option("", "Name of the run in Weights & Biases.")
    wandb_save_dir: str = option("", "Directory for local files of Weights & Biases.")
    profile: Literal["pt", "pt-full", "hltv"] | None = option(
        None, "Profile with PyTorch; pt-full adds memory and call stacks, hltv is the profiler of Gaudi's vendor."
    )
    profile_steps: str = option(
        "2,3",
        "First and last iteration that is profiled, counted from 1.",
        "--profile_steps",
        aliases=("--profile-steps",),
    )
    profile_ranks: tuple[int, ...] | None = option(None, "Ranks that are profiled. Default: all.", minimum=0)
    log_model_inputs: bool = option(False, "Write the inputs of the model to --tensor-logger-path.")
    log_fwd_activations: bool = option(False, "Write the outputs of all modules to --tensor-logger-path.")
    log_bwd_grads: bool = option(
        False, "Write the gradients of inputs and outputs of all modules to --tensor-logger-path."
    )
    tensor_logger_start_iter: int = option(0, "First iteration whose tensors are written, counted from 1.", minimum=0)
    tensor_logger_end_iter: int = option(0, "Last iteration whose tensors are written; 0 = none are.", minimum=0)
    tensor_logger_path: str | None = option(None, "Directory for the tensors, one file per rank and iteration.")
    check_tp_norm: bool = option(False, "Compare what tensor-parallel ranks hold alike, at every norm layer.")
    check_tp_norm_type: Literal["all", "io", "wb"] = option(
        "all", "What --check-tp-norm compares: inputs and outputs, weights and biases, or all."
    )
    start_check_tp_norm_iter: int = option(-1, "First iteration that is compared, counted from 1. Default: all.")
    end_check_tp_norm_iter: int = option(-1, "Last iteration that is compared. Default: all.")
