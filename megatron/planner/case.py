"""What is planned: a model, a machine and one way to train the one on the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.config.architecture import Architecture
from megatron.config.derive import architecture
from megatron.model import capacity
from megatron.model.recompute import RecomputePlan, recompute_plan
from megatron.model.routing import RoutingPlan
from megatron.mpu.pipeline import StageLayout
from megatron.mpu.schedule import ScheduleName
from megatron.mpu.topology import Topology
from megatron.planner.machines import Machine
from megatron.training.routing import routing_plan

AttentionKernel = Literal["fused", "masked", "weights", "blocked", "reference"]
"""What attention keeps for the backward pass:

fused: queries, keys, values, result and one number per row (flash-attn, cuDNN, vendors' kernels)
masked: the same and an explicit mask (torch's SDPA with ALiBi, a window or documents)
weights: the attention weights of all pairs, in the dtype of the model
blocked, reference: see `megatron.ops.blocked_attention` and `megatron.ops.reference`
"""
ATTENTION_KERNELS: Mapping[str, tuple[AttentionKernel, AttentionKernel]] = {
    "flash_attn": ("fused", "fused"),
    "flash_attn_3": ("fused", "fused"),
    "fusion_attention": ("fused", "masked"),
    "sdpa": ("fused", "masked"),
    "fused_sdpa": ("weights", "weights"),
    "fused_sdpa_fast": ("weights", "weights"),
    "fused_sdpa_recompute": ("fused", "masked"),
    "fused_sdpa_fast_recompute": ("fused", "masked"),
    "masked_softmax": ("weights", "weights"),
    "compiled_sdpa": ("weights", "weights"),
    "blocked": ("blocked", "blocked"),
    "reference": ("reference", "reference"),
}
"""By implementation of the operation: without, and with ALiBi, a window or documents."""
_BUCKET, _LIVE = 500_000_000, 1_000_000_000
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Kernels:
    """Facts about the operations of a device that decide how much memory they keep."""

    attention: AttentionKernel = "fused"
    dropout_mask: int = 1
    """Bytes per element: accelerators keep a bool, CPUs a number of the hidden states' dtype."""
    loss_chunk: int | None = None
    """Logits that the loss widens at a time; None for accelerators' figures."""
    whole_logits: bool = True
    """All logits of a micro-batch are there at once; without, a part at a time (`--op linear_cross_entropy`)."""
    wide_products: bool = False
    """8-bit products are made of float32 copies, as CPUs do; accelerators multiply the 8-bit forms."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a machine and a layout: everything that a plan follows from."""

    arch: Architecture
    machine: Machine
    topology: Topology
    """Its context-parallel axis holds the ranks of both ways to split a sequence."""
    sequence_parallel: bool = False
    stages: StageLayout
    schedule: ScheduleName = "1f1b"
    engine: Literal["native", "deepspeed"] = "native"
    zero_stage: int = 0
    replicas: int = 1
    """Copies of the sharded training state; stage 0 of the native engine is one copy per data-parallel rank."""
    offload: bool = False
    """DeepSpeed: optimizer state and step on the host."""
    offload_parameters: bool = False
    """DeepSpeed, stage 3: parameters on the host while they are not used."""
    bucket: int = _BUCKET
    """DeepSpeed: parameters whose gradients are reduced at once (reduce_bucket_size)."""
    live_parameters: int = _LIVE
    """DeepSpeed, stage 3: parameters that are gathered at once, at most (stage3_max_live_parameters)."""
    seq_length: int
    micro_batch: int
    global_batch: int
    recompute: RecomputePlan = field(default_factory=RecomputePlan)
    itemsize: int = 2
    """Bytes of a weight in the forward pass, and of a hidden state."""
    grad_itemsize: int = 4
    """Bytes of a gradient while it is summed over micro-batches and ranks."""
    moments: int = 2
    """Float32 numbers per parameter that the optimizer keeps beside the weight: 2 for Adam."""
    routing: RoutingPlan = field(default_factory=RoutingPlan)
    """How tokens are shared out among experts, if there are any."""
    kernels: Kernels = field(default_factory=Kernels)
    documents: bool = False
    """Attention stays within documents; positions start anew in each."""
    compiled: bool = False
    fp8: bool = False
    """Matrix products of the layers' linear maps in 8 bits."""
    fp8_weight_gradients: bool = True
    """With 8 bits: those that give gradients of weights, too."""
    fp8_weights_kept: bool = False
    """With 8 bits: the 8-bit forms of weights are kept."""

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.topology.tp

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return self.topology.pp

    @property
    def cp(self) -> int:
        """Ranks that share a sequence."""
        return self.topology.cp

    @property
    def ulysses(self) -> int:
        """Those of them that share it by heads."""
        return self.topology.ulysses

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.topology.dp

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same weights, over which gradients are summed."""
        return self.topology.dp * self.topology.cp

    @property
    def ep(self) -> int:
        """Ranks that share the experts of a layer."""
        return self.topology.ep

    @property
    def shards(self) -> int:
        """Ranks over which the training state is cut, that of shared experts aside."""
        return self.shards_of(experts=False)

    def holders(self, *, experts: bool) -> int:
        """Ranks that hold the same weights; `experts`: the same experts, where ranks share them."""
        return self.data_ranks // (self.ep if experts else 1)

    def shards_of(self, *, experts: bool) -> int:
        """Ranks over which the training state of such weights is cut."""
        if self.engine == "native" and self.zero_stage == 0:
            return 1
        return max(1, self.holders(experts=experts) // self.replicas)

    @property
    def microbatches(self) -> int:
        """Micro-batches per step and data-parallel rank."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank, before sequence parallelism splits them."""
        return self.seq_length // self.cp * self.micro_batch

    @property
    def expert_rows(self) -> int:
        """Rows that the experts of a rank work on in a layer: choices of a micro-batch, when all experts get equally
        many; with a capacity at most that, and with rows that only fill up.
        """
        experts, routing = self.arch.experts, self.routing
        if experts is None:
            return 0
        choices, factor = self.tokens * experts.topk, routing.train_capacity_factor
        if factor is not None:
            limit = capacity.capacity(self.tokens, experts.count, experts.topk, factor, routing.min_capacity)
            return experts.count * limit if routing.pad else min(choices, experts.count * limit)
        if routing.bins is not None:
            return experts.count * capacity.rounded(math.ceil(choices / experts.count), routing.bins)
        return choices

    def layers_with_experts(self, stage: int) -> list[bool]:
        """Whether each layer of a stage has experts."""
        return [self.arch.has_experts(number) for number in self.stages.layers_of(stage)]

    @property
    def split(self) -> int:
        """Tensor-parallel ranks among which the tokens between the layers are split."""
        return self.tp if self.sequence_parallel else 1

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.global_batch * self.seq_length

    @property
    def kv_heads(self) -> int:
        """Key and value heads of one tensor-parallel rank; heads fewer than ranks are replicated."""
        return max(1, self.arch.num_kv_heads // self.tp)

    @property
    def kv_copies(self) -> int:
        """Tensor-parallel ranks that hold each key and value head."""
        return max(1, self.tp // self.arch.num_kv_heads)


def case_of(
    settings: Mapping[str, Any], vocab_size: int, machine: Machine, document: Mapping[str, Any] | None = None
) -> Case:
    """The case that complete settings describe; they must obey the rules of `megatron.config.rules`.

    Args:
        settings: every setting by name, world size included.
        vocab_size: tokens the tokenizer can produce.
        machine: what the ranks are.
        document: content of --deepspeed_config.
    """
    arch = architecture(settings, vocab_size)
    pp, ulysses = settings["pipeline_model_parallel_size"], settings["ulysses_parallel_size"]
    schedule: ScheduleName = settings["pipeline_schedule"]
    deepspeed = settings["deepspeed"]
    return Case(
        arch=arch,
        machine=machine,
        topology=Topology(
            settings["world_size"],
            tp=settings["tensor_model_parallel_size"],
            cp=settings["ring_parallel_size"] * ulysses,
            pp=pp,
            ep=settings["moe_expert_parallel_size"],
            ulysses=ulysses,
        ),
        sequence_parallel=settings["sequence_parallel"],
        stages=StageLayout(pp, settings["pipeline_stage_layers"], "vee" if schedule == "zbv" else "loop"),
        schedule=schedule,
        engine="deepspeed" if deepspeed else "native",
        zero_stage=settings["zero_stage" if deepspeed else "zero_stage_native"],
        replicas=settings["num_distributed_optimizer_instances"],
        offload=settings["cpu_optimizer"],
        offload_parameters=settings["remote_device"] != "none",
        bucket=_of_zero(document, "reduce_bucket_size", _BUCKET),
        live_parameters=_of_zero(document, "stage3_max_live_parameters", _LIVE),
        seq_length=settings["seq_length"],
        micro_batch=settings["micro_batch_size"],
        global_batch=settings["global_batch_size"],
        recompute=recompute_plan(settings),
        routing=routing_plan(settings, arch) or RoutingPlan(),
        itemsize=_ITEMSIZE[settings["params_dtype"]],
        grad_itemsize=2 if settings["grad_reduce_in_bf16"] else 4,
        moments=_moments(settings),
        kernels=Kernels(
            attention=_attention(settings, arch, machine),
            whole_logits="linear_cross_entropy=chunked" not in settings["op"],
        ),
        fp8=settings["fp8_format"] is not None,
        fp8_weight_gradients=settings["fp8_wgrad"],
        fp8_weights_kept=settings["cache_fp8_weight"],
        documents=settings["reset_attention_mask"],
        compiled=settings["use_torch_compile"],
    )


def _of_zero(document: Mapping[str, Any] | None, key: str, default: int) -> int:
    """A number of the section zero_optimization of DeepSpeed's JSON."""
    value = (document or {}).get("zero_optimization", {}).get(key)
    return int(value) if isinstance(value, (int, float)) else default


def _moments(settings: Mapping[str, Any]) -> int:
    if settings["optimizer"] == "sgd":
        return 1 if settings["sgd_momentum"] else 0
    return 2


def _attention(settings: Mapping[str, Any], arch: Architecture, machine: Machine) -> AttentionKernel:
    """The kernel that is asked for; without a wish, that of the machine."""
    asked = dict(item.split("=", 1) for item in settings["op"]).get("attention")
    backend = settings["attention_backend"]
    if asked is None and (backend in ("unfused", "local") or not settings["masked_softmax_fusion"]):
        asked = "reference"
    elif asked is None and backend == "flash":
        asked = "flash_attn"
    elif asked is None or (asked == "sdpa" and machine.attention_op == "compiled_sdpa"):
        asked = machine.attention_op
    masked = arch.position == "alibi" or arch.sliding_window is not None or settings["reset_attention_mask"]
    return ATTENTION_KERNELS.get(asked, ATTENTION_KERNELS["sdpa"])[1 if masked else 0]
