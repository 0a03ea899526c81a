"""What CPUs run, in order of preference per operation. Measured figures: docs/ops.md."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import portable, reference
from megatron.ops.blocked_attention import blocked_attention
from megatron.ops.registry import Implementation, implements

_SCORES_IN_OWN_DTYPE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""Scores and weights are rounded to the dtype of q, as every product of that dtype is; softmax is float32 inside."""

attention = implements(reference.attention, name="blocked", tolerance=_SCORES_IN_OWN_DTYPE)(blocked_attention)

_CACHED_LOGITS = 2**17
"""Half a MiB of float32 logits stays in a core's cache."""


@implements(reference.cross_entropy, name="chunked")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """See `portable.chunked_cross_entropy`."""
    return portable.chunked_cross_entropy(logits, labels, _CACHED_LOGITS)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    attention,
    portable.sdpa_attention,
    portable.rms_norm,
    portable.layer_norm,
    portable.rotary,
    portable.swiglu,
    portable.geglu,
    portable.bias_gelu,
    cross_entropy,
    portable.adamw,
)
