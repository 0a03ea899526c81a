"""What CPUs run, in order of preference per operation. Measured figures: docs/ops.md."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import attention_blocks, cached_attention, grouped_mm, linear_cross_entropy, portable, reference
from megatron.ops.blocked_attention import blocked_attention
from megatron.ops.registry import Implementation, implements

attention = implements(reference.attention, name="blocked", tolerance=portable.ATTENTION_TOLERANCE)(blocked_attention)

grouped_matmul = implements(
    reference.grouped_matmul,
    name="grouped_mm",
    tolerance=grouped_mm.TOLERANCE,
    why_unavailable=grouped_mm.why_unavailable,
)(grouped_mm.grouped_matmul)

_CACHED_LOGITS = 2**17
"""Per thread: half a MiB of float32 logits stays in a core's cache."""


@implements(reference.cross_entropy, name="chunked")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """No float32 copy of all logits, see `portable.chunked_cross_entropy`."""
    return portable.chunked_cross_entropy(logits, labels, _CACHED_LOGITS * torch.get_num_threads())


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    attention,
    portable.sdpa_attention,
    cached_attention.cached_attention,
    attention_blocks.attention_block,
    attention_blocks.attention_block_backward,
    portable.embedding_float32_sums,
    portable.rms_norm,
    portable.layer_norm,
    portable.rotary,
    portable.swiglu,
    portable.geglu,
    portable.grouped_matmul,
    grouped_matmul,
    portable.matmul_all_reduce,
    portable.bias_gelu,
    cross_entropy,
    linear_cross_entropy.linear_cross_entropy,
    portable.clip_grad_norm,
    portable.adamw,
)
