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


def deepspeed_has_one_schedule(pipeline_schedule: str, deepspeed: bool) -> str | None:
    """DeepSpeed's pipeline has one stage per rank."""
    if deepspeed and pipeline_schedule != "1f1b":
        return f"--pipeline-schedule {pipeline_schedule}: with --deepspeed it must be 1f1b; leave --deepspeed out"
    return None


def deepspeed_pipeline_shards_the_optimizer(
    pipeline_model_parallel_size: int, zero_stage: int, deepspeed: bool
) -> str | None:
    """DeepSpeed's pipeline has no stages 2 and 3, and clips the gradients of each rank by themselves at stage 0."""
    if deepspeed and pipeline_model_parallel_size > 1 and zero_stage != 1:
        return (
            f"--zero-stage {zero_stage}: must be 1 with --deepspeed and --pipeline-model-parallel-size "
            f"{pipeline_model_parallel_size}; the native engine has pipelines with stages 0 to 3"
        )
    return None


def deepspeed_stages_have_layers(pipeline_stage_layers: tuple[int, ...], deepspeed: bool) -> str | None:
    """DeepSpeed sums norms per group of parameters, so every stage needs both groups: weights, and biases and norms."""
    if deepspeed and pipeline_stage_layers[0] == 0:
        return "the first pipeline stage has no layers: with --deepspeed it must have one; change the cut of the layers"
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


def split_backward_has_logits(pipeline_schedule: str, op: tuple[str, ...]) -> str | None:
    """What is left for later is made of the gradients of all logits."""
    without = [item for item in op if item.startswith("linear_cross_entropy=")]
    if pipeline_schedule in _ZERO_BUBBLE and without:
        return f"--op {without[0]}: not with --pipeline-schedule {pipeline_schedule}; take 1f1b or interleaved"
    return None


RULES: tuple[Rule, ...] = (
    pipeline_has_ranks,
    pipeline_has_stages,
    deepspeed_has_one_schedule,
    deepspeed_pipeline_shards_the_optimizer,
    deepspeed_stages_have_layers,
    split_backward_keeps_parameters,
    split_backward_is_not_compiled,
    split_backward_has_logits,
)
