"""Settings of the layout: how ranks share the model and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import derived, option, resolved


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout. `world_size` and `local_rank` come from the environment of the launcher."""

    world_size: int = derived()  # ranks
    local_rank: int = resolved(
        "Number of this rank among the ranks of its node. Default: LOCAL_RANK of the environment, or 0.",
        aliases=("--local_rank",),
        minimum=0,
    )
    data_parallel_size: int = derived()  # ranks

    tensor_model_parallel_size: int = option(1, "Ranks that share every layer (tensor parallelism).", minimum=1)
    kv_replicator: int = resolved(
        "Tensor-parallel ranks that hold each key and value head. Default: as many as give every rank a head, which is "
        "the one value that is accepted.",
        aliases=("--kv_replicator", "--kv-size-multiplier", "--kv_size_multiplier"),
        minimum=1,
    )
    pipeline_model_parallel_size: int = option(1, "Ranks that share the layers among them (pipeline).", minimum=1)
    context_parallel_size: int = option(1, "Ranks that share every sequence (context parallelism).", minimum=1)
    ds_sequence_parallel_size: int = option(1, "Ranks that share every sequence by heads (Ulysses).", minimum=1)
    cp_comm_type: Literal["p2p", "a2a"] = option(
        "p2p",
        "What --context-parallel-size means: p2p, keys and values go round a ring; a2a, the ranks share every sequence "
        "by heads, as with --ds-sequence-parallel-size.",
    )
    ring_parallel_size: int = derived()  # ranks
    ulysses_parallel_size: int = derived()  # ranks
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"] = resolved(
        "Order of the work in a pipeline: gpipe or 1f1b for one stage per rank, interleaved for several, zbv for two, "
        "zero-bubble for any number. Default: 1f1b, or interleaved for several stages per rank."
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "Pipeline with several stages per rank: layers of a stage.", minimum=1
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "Pipeline with several stages per rank: their number.", minimum=1
    )
    virtual_pipeline_model_parallel_size: int = derived()  # stages per pipeline rank
    pipeline_stage_layers: tuple[int, ...] = derived()  # layers of every stage
    decoder_first_pipeline_num_layers: int | None = option(
        None, "Layers of the first pipeline rank, where the others have equally many.", minimum=0
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "Layers of the last pipeline rank, where the others have equally many.", minimum=0
    )
    standalone_embedding_stage: bool = option(False, "The first pipeline rank has the embedding and no layers.")
    account_for_embedding_in_pipeline_split: bool = option(
        False, "The embedding counts as a layer where layers are shared equally by the pipeline stages."
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "The loss counts as a layer where layers are shared equally by the pipeline stages."
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "What is in each pipeline stage: E for the embedding, t for a layer, L for the loss, | between stages; t*3 is "
        "ttt, (t|)*2 is t|t|. Example: Et*3|(t*4|)*6t*3L.",
    )
    sequence_parallel: bool = option(
        False, "Share norms and dropout among the tensor-parallel ranks along the sequence."
    )

    zero_stage: int = option(
        1,
        "ZeRO stage: 0 replicates, 1 shards the optimizer, 2 the gradients too, 3 the parameters too. Without the flag "
        "the native engine uses stage 0, or 1 with --use-distributed-optimizer.",
        choices=(0, 1, 2, 3),
    )
    zero_stage_native: int = derived()
    num_distributed_optimizer_instances: int = option(
        1, "Copies of the sharded optimizer (hybrid sharding): groups of ranks.", minimum=1
    )

    overlap_grad_reduce: bool = option(
        False, "DeepSpeed: reduce gradients beside the backward pass. The native engine always does."
    )
    distributed_backend: Literal["nccl", "gloo", "ccl", "hccl", "neuron", "xla"] | None = option(
        "nccl", "Collective library. Without the flag: that of the device."
    )
    distributed_timeout_minutes: int = option(
        10, "Give up a collective operation after this time, in minutes.", minimum=1
    )
