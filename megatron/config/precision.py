"""Settings of number formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import derived, option


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Formats of parameters and gradients, and the loss scale of float16."""

    params_dtype: Literal["float32", "float16", "bfloat16"] = derived()
    fp16: bool = option(False, "Compute in float16, with a loss scale.")
    bf16: bool = option(False, "Compute in bfloat16.")
    accumulate_allreduce_grads_in_fp32: bool = option(
        False, "Sum gradients in float32; always so with bfloat16 unless --grad-reduce-in-bf16."
    )
    grad_reduce_in_bf16: bool = option(False, "Sum gradients over data-parallel ranks in bfloat16.")
    loss_scale: float | None = option(None, "Fixed factor of the loss. Default: a factor that adapts.", minimum=0)
    initial_loss_scale: float = option(2.0**32, "First value of the adapting loss factor.", minimum=1)
    min_loss_scale: float = option(1.0, "Lowest value of the adapting loss factor.", minimum=0)
    loss_scale_window: float = option(
        1000, "Iterations without overflow after which the loss factor doubles.", minimum=1
    )
    hysteresis: int = option(2, "Iterations with overflow after which the loss factor halves.", minimum=1)
    fp8_format: Literal["e4m3", "e5m2", "hybrid"] | None = option(
        None, "Compute the linear layers of transformer layers in 8 bits; hybrid is E4M3 with E5M2 gradients."
    )
    fp8_recipe: Literal["delayed", "tensorwise"] = option(
        "delayed",
        "Scales of 8-bit numbers follow from values of earlier steps (delayed) or of the tensor itself.",
        synonyms={"current": "tensorwise"},
    )
    fp8_margin: int = option(0, "Room above the largest 8-bit number, a factor as a power of two.", minimum=0)
    fp8_interval: int = option(1, "Time between measurements for scales, in iterations.", minimum=1)
    fp8_amax_history_len: int = option(1, "Measurements that scales follow from, without unit.", minimum=1)
    fp8_amax_compute_algo: Literal["most_recent", "max"] = option(
        "most_recent", "Scales follow from the last measurement or from the largest one."
    )
    fp8_amax_reduce: bool = option(
        True,
        "Each rank has scales of its own, which then depend on the layout.",
        "--no-fp8-amax-reduce",
        opposites=("--fp8-amax-reduce",),
    )
    cache_fp8_weight: bool = option(
        False,
        "Make the 8-bit form of a weight once per step and keep it, a byte per number, instead of in each pass.",
    )
    fp8_wgrad: bool = option(True, "Compute the gradients of weights in 16 bits.", "--no-fp8-wgrad")
