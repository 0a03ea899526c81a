"""Small models, machines and layouts for the tests of the planner."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron.config.architecture import Architecture
from megatron.config.experts import Experts
from megatron.config.run import RunConfig, parse
from megatron.data.batch import Batch
from megatron.model.recompute import RecomputePlan
from megatron.mpu.pipeline import StageLayout
from megatron.mpu.topology import Topology
from megatron.planner.case import Case, Kernels, case_of
from megatron.planner.machines import MACHINES
from megatron.planner.request import read_request, resolve

LLAMA: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "ffn_hidden_size": 160,
    "vocab_size": 500,
    "padded_vocab_size": 512,
    "max_positions": 4096,
}
GPT2 = LLAMA | {
    "num_kv_heads": 8,
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "linear_bias": True,
    "position": "learned",
    "tied_embeddings": True,
}


def with_experts(arch: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A model like `arch` whose second layer alone is dense; `changes` are fields of `Experts`."""
    shape = {"count": 8, "topk": 2, "ffn_hidden_size": 96, "layers": (0, 2)} | changes
    return {**(arch or {}), "experts": Experts(**shape)}


def case(
    arch: dict[str, Any] | None = None,
    *,
    world: int = 1,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ulysses: int = 1,
    ep: int = 1,
    **changes: Any,
) -> Case:
    """A case of a small model; `changes` are fields of `Case`."""
    model = Architecture(**{**LLAMA, **(arch or {})})
    recompute = changes.pop("recompute", RecomputePlan())
    kernels = Kernels(changes.pop("attention", "fused"), 2, whole_logits=changes.pop("whole_logits", True))
    values: dict[str, Any] = {"seq_length": 128, "micro_batch": 2, "global_batch": 2 * world // (tp * pp * cp)}
    values |= {"sequence_parallel": False, "kernels": kernels} | changes
    layers = tuple(model.num_layers // pp + (at < model.num_layers % pp) for at in range(pp))
    return Case(
        arch=model,
        machine=MACHINES["h100"],
        topology=Topology(world, tp=tp, pp=pp, cp=cp, ulysses=ulysses, ep=ep),
        stages=StageLayout(pp, layers),
        recompute=recompute,
        **values,
    )


FLAGS = (
    *("--num-layers", "6", "--hidden-size", "128", "--num-attention-heads", "8", "--num-key-value-heads", "4"),
    *("--ffn-hidden-size", "384", "--max-position-embeddings", "512", "--vocab-size", "511"),
    *("--position-embedding-type", "rope", "--normalization", "rmsnorm", "--swiglu", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--make-vocab-size-divisible-by", "8", "--op", "attention=sdpa", "--lr", "1e-3", "--train-iters", "2"),
    *("--tokenizer-type", "NullTokenizer", "--mock-data", "--seq-length", "16", "--micro-batch-size", "1"),
)
EXPERT_FLAGS = (
    *("--num-experts", "4", "--topk", "2", "--moe-layer-freq", "2", "--disable-moe-top2-2nd-expert-sampling"),
    *("--moe-expert-capacity-factor", "1", "--moe-pad-expert-input-to-capacity", "--moe-min-capacity", "0"),
)
"""Experts with equally many tokens in every second layer: a fake world cannot say how many come."""
_VOCABULARY = 512
_CPU_LOGITS = 2**17


def planned(flags: Sequence[str], world: int, *, tied: bool = False) -> tuple[RunConfig, Case]:
    """The settings of a run of a small LLaMA on the CPU, and its plan."""
    argv = [word for word in (*FLAGS, *flags) if not (tied and word == "--untie-embeddings-and-output-weights")]
    request = read_request(argv, world)
    resolved = resolve(request)
    assert not resolved.impossible
    found = case_of(resolved.settings, _VOCABULARY, MACHINES["h100"])
    kernels = dataclasses.replace(
        found.kernels, dropout_mask=found.itemsize, loss_chunk=_CPU_LOGITS, wide_products=True
    )
    return parse(argv, {"WORLD_SIZE": str(world)}), dataclasses.replace(found, kernels=kernels)


def batch(config: RunConfig) -> Batch:
    """A micro-batch of such a run."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    tokens = torch.randint(0, _VOCABULARY, shape)
    return Batch(
        tokens=tokens,
        labels=tokens,
        loss_mask=torch.ones(shape),
        position_ids=None,
        document_ids=None,
        dropout_seed=1,
    )
