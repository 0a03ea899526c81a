"""Rules about experts; see `megatron.config.rules` for how they are run."""

from __future__ import annotations

from collections.abc import Callable

from megatron.config.experts import expert_layers

Rule = Callable[..., str | None]
Given = frozenset[str]


def layers_have_equally_many_experts(num_experts: tuple[int, ...]) -> str | None:
    """A list is Megatron-DeepSpeed's way to give layers different numbers."""
    if len(set(num_experts)) > 1:
        words = " ".join(map(str, num_experts))
        return f"--num-experts {words}: all layers with experts have equally many here; give one number"
    return None


def ranks_share_experts(
    num_experts: tuple[int, ...],
    moe_expert_parallel_size: int,
    data_parallel_size: int,
    context_parallel_size: int,
    ds_sequence_parallel_size: int,
) -> str | None:
    """Ranks of the plane of data- and context-parallel ranks have the same number of experts."""
    if moe_expert_parallel_size == 1:
        return None
    text = f"--moe-expert-parallel-size {moe_expert_parallel_size}"
    if max(num_experts) == 1:
        return f"{text}: the model has no experts; give --num-experts, or leave it out"
    if num_experts[0] % moe_expert_parallel_size:
        return f"{text}: must divide --num-experts {num_experts[0]}"
    plane = data_parallel_size * context_parallel_size * ds_sequence_parallel_size
    if plane % moe_expert_parallel_size:
        return f"{text}: must divide {plane}, the data-parallel ranks times those that share sequences"
    return None


def copies_of_experts_divide(
    num_distributed_optimizer_instances: int,
    moe_expert_parallel_size: int,
    data_parallel_size: int,
    context_parallel_size: int,
    ds_sequence_parallel_size: int,
) -> str | None:
    """Copies of the training state are whole ones for experts, too, which fewer ranks hold."""
    copies = num_distributed_optimizer_instances
    plane = data_parallel_size * context_parallel_size * ds_sequence_parallel_size
    holders = plane // moe_expert_parallel_size
    if moe_expert_parallel_size == 1 or plane % moe_expert_parallel_size or holders % copies == 0:
        return None
    return (
        f"--num-distributed-optimizer-instances {copies}: must divide {holders}, the ranks that hold the same experts "
        f"with --moe-expert-parallel-size {moe_expert_parallel_size}"
    )


def experts_split(
    num_experts: tuple[int, ...],
    moe_ffn_hidden_size: int | None,
    moe_shared_expert_intermediate_size: int | None,
    expert_tensor_parallel_size: int,
    tensor_model_parallel_size: int,
) -> str | None:
    """Every expert is split over the tensor-parallel ranks, as dense layers are."""
    tp = tensor_model_parallel_size
    if expert_tensor_parallel_size != tp:
        return f"--expert-tensor-parallel-size {expert_tensor_parallel_size}: only {tp}, --tensor-model-parallel-size"
    sizes = {
        "--moe-ffn-hidden-size": moe_ffn_hidden_size,
        "--moe-shared-expert-intermediate-size": moe_shared_expert_intermediate_size,
    }
    for flag, size in sizes.items():
        if size is not None and size % tp and max(num_experts) > 1:
            return f"{flag} {size}: must be a multiple of --tensor-model-parallel-size {tp}"
    return None


def tokens_have_enough_experts(num_experts: tuple[int, ...], topk: int) -> str | None:
    """A token goes to different experts."""
    if 1 < max(num_experts) < topk:
        return f"--topk {topk}: must be at most --num-experts {max(num_experts)}"
    return None


def layers_with_experts_are_known(
    num_experts: tuple[int, ...], num_layers: int, expert_interval: int, moe_layer_freq: str | None
) -> str | None:
    """Some layer has experts, and the list says so for every layer."""
    if max(num_experts) == 1:
        return None
    try:
        layers = expert_layers(num_layers, expert_interval, moe_layer_freq)
    except ValueError as problem:
        return str(problem)
    if not layers:
        return f"--expert-interval {expert_interval}: no layer of {num_layers} has experts; lower it"
    return None


def capacity_is_given_once(moe_expert_capacity_factor: float | None, given: Given) -> str | None:
    """Megatron-LM has one factor, Megatron-DeepSpeed two and a switch."""
    names = ("moe_train_capacity_factor", "moe_eval_capacity_factor", "moe_token_dropping")
    flags = ["--" + name.replace("_", "-").replace("moe-token", "disable-moe-token") for name in names if name in given]
    if moe_expert_capacity_factor is not None and flags:
        return f"--moe-expert-capacity-factor and {', '.join(flags)}: give the one or the others"
    return None


def capacity_has_a_limit(
    moe_token_dropping: bool, moe_num_capacity_bins: int, moe_pad_expert_input_to_capacity: bool
) -> str | None:
    """Bins are for experts without a capacity, filling up is to the capacity."""
    if moe_token_dropping and moe_num_capacity_bins:
        return f"--moe-num-capacity-bins {moe_num_capacity_bins}: only with --disable-moe-token-dropping"
    if moe_pad_expert_input_to_capacity and not moe_token_dropping:
        return "--moe-pad-expert-input-to-capacity: not with --disable-moe-token-dropping; see --moe-num-capacity-bins"
    return None


def deepspeed_knows_its_experts(
    deepspeed: bool, moe_expert_parallel_size: int, zero_stage: int, pipeline_model_parallel_size: int
) -> str | None:
    """DeepSpeed averages the gradients of experts over fewer ranks in its optimizer of stages 1 and 2 alone."""
    if not deepspeed or moe_expert_parallel_size == 1:
        return None
    text = f"--moe-expert-parallel-size {moe_expert_parallel_size}: with --deepspeed"
    if zero_stage not in (1, 2):
        why = "takes means of norms" if zero_stage == 0 else "shards over all data-parallel ranks"
        return f"{text} only --zero-stage 1 or 2, stage {zero_stage} of DeepSpeed {why}; leave --deepspeed out"
    if pipeline_model_parallel_size > 1:
        return f"{text} only --pipeline-model-parallel-size 1; leave --deepspeed out"
    return None


def experts_have_changing_shapes(num_experts: tuple[int, ...], use_torch_compile: bool) -> str | None:
    """A compiler would compile for every number of tokens of every expert."""
    if max(num_experts) > 1 and use_torch_compile:
        return "--use-torch-compile: not with --num-experts, whose shapes change with every step; leave it out"
    return None


RULES: tuple[Rule, ...] = (
    layers_have_equally_many_experts,
    ranks_share_experts,
    copies_of_experts_divide,
    experts_split,
    tokens_have_enough_experts,
    layers_with_experts_are_known,
    capacity_is_given_once,
    capacity_has_a_limit,
    deepspeed_knows_its_experts,
    experts_have_changing_shapes,
)
