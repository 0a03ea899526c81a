"""Settings of the device and of the implementations of operations on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where the run computes, and with which kernels."""

    device: Literal["auto", "cpu", "cuda", "hpu", "npu", "neuron", "neuron_xla"] = option(
        "auto", "Kind of device. auto takes the first that is there."
    )
    op: tuple[str, ...] = option(
        (), "Implementation of an operation, as name=implementation; may be repeated.", repeat=True
    )
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = option(
        "auto",
        "Kind of attention kernel: flash and fused keep no score matrix, unfused and local are plain operations.",
    )
    masked_softmax_fusion: bool = option(True, "Attention from plain operations.", "--no-masked-softmax-fusion")
    bias_gelu_fusion: bool = option(
        True, "Exact GELU from plain operations; the fused one is the tanh approximation.", "--no-bias-gelu-fusion"
    )
    bias_dropout_fusion: bool = option(True, "Dropout and residual from plain operations.", "--no-bias-dropout-fusion")
    use_fused_rmsnorm: bool | None = option(
        None, "true: the device's fused RMSNorm or a refusal; false: plain operations.", words=True
    )
    transformer_impl: Literal["local", "transformer_engine"] = option(
        "local", "transformer_engine: 8-bit layers by the vendor's engine, else by the device's kernels, or a refusal."
    )
    use_torch_compile: bool = option(False, "Compile each layer with torch.compile.", words=True)
