"""What AWS Trainium runs, in order of preference per operation: torch's own operators, which the vendor compiles.

The native package offers no fused operators of its own under a published contract; its compiler fuses. Shapes are
static and nothing reads a value on the host, so that every step runs what the first one has compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron.ops import attention_blocks, cached_attention, linear_cross_entropy, portable, reference
from megatron.ops.compiled_adamw import CompiledAdamW
from megatron.ops.registry import ADAMW_TOLERANCE, Implementation, implements

_CHUNK_LOGITS = 2**26
"""A quarter GiB of float32 logits at a time: large enough to fill the core, small beside the logits themselves."""


@implements(reference.cross_entropy, name="chunked")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """No float32 copy of all logits, see `portable.chunked_cross_entropy`."""
    return portable.chunked_cross_entropy(logits, labels, _CHUNK_LOGITS)


@implements(reference.adamw, name="compiled", tolerance=ADAMW_TOLERANCE)
def adamw(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Plain operations on all parameters at a time, none of which is compiled twice; see `CompiledAdamW`."""
    return CompiledAdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
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
    portable.matmul_all_reduce,
    portable.bias_gelu,
    cross_entropy,
    linear_cross_entropy.linear_cross_entropy,
    portable.clip_grad_norm,
    adamw,
    portable.adamw,
)
