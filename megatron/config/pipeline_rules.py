"""Rules about pipelines; see `megatron.config.rules` for how they are run."""

from __future__ import annotations

from collections.abc import Callable

from megatron.config import pipeline

Rule = Callable[..., str | None]
_ZERO_BUBBLE = ("zero-bubble", "zbv")


def pipeline_has_ranks(pipeline_model_parallel_size: int, given: frozenset[str]) -> str | None:
    """How a pipeline is cut says nothing without one."""
    flags = ["--" + name.replace("_", "-") for name in pipeline.NAMES if name in given]
    if flags and pipeline_model_parallel_size == 1:
        return f"{', '.join(flags)}: only with --pipeline-model-parallel-size above 1"
    return None


def pipeline_has_stages(
    num_layers: int,
    pipeline_model_parallel_size: int,
    num_layers_per_virtual_pipeline_stage: int | None,
    num_virtual_stages_per_pipeline_rank: int | None,
    standalone_embedding_stage: bool,
    decoder_first_pipeline_num_layers: int | None,
    decoder_last_pipeline_num_layers: int | None,
    account_for_embedding_in_pipeline_split: bool,
    account_for_loss_in_pipeline_split: bool,
    pipeline_model_parallel_layout: str | None,
    pipeline_schedule: pipeline.Schedule | None,
) -> str | None:
    """The layers can be cut into the stages that are asked for."""
    try:
        pipeline.split(locals())
    except pipeline.PipelineError as error:
        return str(error)
    return None


def pipeline_is_native(pipeline_model_parallel_size: int, deepspeed: bool) -> str | None:
    """DeepSpeed's pipeline is not there yet."""
    if deepspeed and pipeline_model_parallel_size > 1:
        return (
            f"--pipeline-model-parallel-size {pipeline_model_parallel_size}: not implemented yet with --deepspeed; "
            "leave --deepspeed out: the native engine has pipelines and the sharding of --zero-stage 0 to 3"
        )
    return None


def split_backward_keeps_parameters(pipeline_schedule: str, zero_stage_native: int) -> str | None:
    """Gradients of weights are computed long after the layer has been left."""
    if pipeline_schedule in _ZERO_BUBBLE and zero_stage_native > 1:
        return f"--zero-stage {zero_stage_native}: must be 0 or 1 with --pipeline-schedule {pipeline_schedule}"
    return None


def split_backward_is_not_compiled(pipeline_schedule: str, use_torch_compile: bool) -> str | None:
    """A compiled backward cannot leave the gradients of weights for later."""
    if pipeline_schedule in _ZERO_BUBBLE and use_torch_compile:
        return f"--use-torch-compile: not with --pipeline-schedule {pipeline_schedule}; take 1f1b or interleaved"
    return None


RULES: tuple[Rule, ...] = (
    pipeline_has_ranks,
    pipeline_has_stages,
    pipeline_is_native,
    split_backward_keeps_parameters,
    split_backward_is_not_compiled,
)
