"""Small models, machines and layouts for the tests of the planner."""

from __future__ import annotations

from typing import Any

from megatron.config.architecture import Architecture
from megatron.model.setting import RecomputePlan
from megatron.mpu.pipeline import StageLayout
from megatron.mpu.topology import Topology
from megatron.planner.case import Case, Kernels
from megatron.planner.machines import MACHINES

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


def case(arch: dict[str, Any] | None = None, *, world: int = 1, tp: int = 1, pp: int = 1, **changes: Any) -> Case:
    """A case of a small model; `changes` are fields of `Case`."""
    model = Architecture(**{**LLAMA, **(arch or {})})
    recompute = changes.pop("recompute", RecomputePlan())
    attention = changes.pop("attention", "fused")
    values: dict[str, Any] = {"seq_length": 128, "micro_batch": 2, "global_batch": 2 * world // (tp * pp)}
    values |= {"sequence_parallel": False, "kernels": Kernels(attention, dropout_mask=2)} | changes
    layers = tuple(model.num_layers // pp + (at < model.num_layers % pp) for at in range(pp))
    return Case(
        arch=model,
        machine=MACHINES["h100"],
        topology=Topology(world, tp=tp, pp=pp),
        stages=StageLayout(pp, layers),
        recompute=recompute,
        **values,
    )
