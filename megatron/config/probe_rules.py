"""Rules about looking into the model; see `megatron.config.rules` for how they are run."""

from __future__ import annotations

from megatron.config.run_rules import Given, Rule


def logged_tensors_have_a_place(
    log_model_inputs: bool,
    log_fwd_activations: bool,
    log_bwd_grads: bool,
    tensor_logger_start_iter: int,
    tensor_logger_end_iter: int,
    tensor_logger_path: str | None,
) -> str | None:
    """What is written, when, and where to go together."""
    what = log_model_inputs or log_fwd_activations or log_bwd_grads
    flags = "--log-model-inputs, --log-fwd-activations or --log-bwd-grads"
    if what and tensor_logger_end_iter and tensor_logger_path is None:
        return f"{flags}: give --tensor-logger-path"
    if tensor_logger_end_iter and not what:
        return f"--tensor-logger-end-iter {tensor_logger_end_iter}: give {flags}"
    if what and not tensor_logger_end_iter:
        return f"{flags}: give --tensor-logger-end-iter, the last iteration that is written"
    if tensor_logger_end_iter and tensor_logger_start_iter > tensor_logger_end_iter:
        return f"--tensor-logger-start-iter {tensor_logger_start_iter}: must be at most {tensor_logger_end_iter}"
    return None


def replicas_can_be_compared(
    check_tp_norm: bool, check_tp_norm_type: str, sequence_parallel: bool, given: Given
) -> str | None:
    """With sequence parallelism ranks normalise different tokens."""
    settings = ("check_tp_norm_type", "start_check_tp_norm_iter", "end_check_tp_norm_iter")
    used = [f"--{name.replace('_', '-')}" for name in settings if name in given]
    if used and not check_tp_norm:
        return f"{', '.join(used)}: only with --check-tp-norm"
    if check_tp_norm and sequence_parallel and check_tp_norm_type != "wb":
        return f"--check-tp-norm-type {check_tp_norm_type}: must be wb with --sequence-parallel, where tokens differ"
    return None


RULES: tuple[Rule, ...] = (logged_tensors_have_a_place, replicas_can_be_compared)
