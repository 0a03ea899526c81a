"""SIMULATION of habana_frameworks.torch.hpex.kernels."""

from __future__ import annotations

from habana_frameworks.torch.hpex.kernels.attention import FusedSDPA
from habana_frameworks.torch.hpex.kernels.rotary import (
    RotaryPosEmbeddingHelperV1,
    RotaryPosEmbeddingHelperV3,
    RotaryPosEmbeddingMode,
    apply_rotary_pos_emb,
)

__all__ = [
    "FusedSDPA",
    "RotaryPosEmbeddingHelperV1",
    "RotaryPosEmbeddingHelperV3",
    "RotaryPosEmbeddingMode",
    "apply_rotary_pos_emb",
]
