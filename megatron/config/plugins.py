"""Names of Colossal-AI's plugins for what they do, in settings of this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plugin:
    """One plugin: the settings it stands for, each of which its own flag overrides, and what they mean."""

    settings: Mapping[str, Any]
    meaning: str


_ON_HOST = {"deepspeed": True, "cpu_optimizer": True}
# After the plugins of Colossal-AI's LLaMA examples (`examples/language/llama2`); their number formats are flags here.
PLUGINS: Mapping[str, Plugin] = {
    "gemini": Plugin({"zero_stage": 3}, "Parameters, gradients and optimizer state shared by the data-parallel ranks."),
    "gemini_auto": Plugin(
        {"zero_stage": 3, **_ON_HOST},
        "The same with the optimizer's state and step on the host, where that plugin leaves them.",
    ),
    "zero2": Plugin({"zero_stage": 2}, "Gradients and optimizer state shared by the data-parallel ranks."),
    "zero2_cpu": Plugin({"zero_stage": 2, **_ON_HOST}, "The same with the optimizer's state and step on the host."),
    "hybrid_parallel": Plugin(
        {
            "tensor_model_parallel_size": 4,
            "pipeline_model_parallel_size": 2,
            "micro_batch_size": 1,
            "zero_stage": 0,
        },
        "The sizes of that script: 4 tensor-parallel ranks, 2 pipeline stages, micro-batches of one sample.",
    ),
    "fsdp": Plugin({"zero_stage": 3}, "PyTorch's FSDP, which is what stage 3 is here."),
    "3d": Plugin(
        {"micro_batch_size": 1, "zero_stage": 0},
        "Micro-batches of one sample; the sizes of the layout and the ZeRO stage are flags.",
    ),
}
