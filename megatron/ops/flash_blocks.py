"""Attention in pieces by the flash kernels that come with torch (Dao 2023), for NVIDIA GPUs.

The operators are those behind `torch.nn.functional.scaled_dot_product_attention`, called by name because the function
does not return the normalizers. They know plain causal and plain full attention in 16 bits; pieces with documents,
windows, ALiBi or other types take the portable form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import attention_blocks, portable, reference
from megatron.ops.block_rules import BlockRules
from megatron.ops.registry import implements

_LARGEST_HEAD, _HEAD_STEP = 256, 8


@implements(reference.attention_block, name="flash", tolerance=portable.ATTENTION_TOLERANCE)
def attention_block(q: Tensor, k: Tensor, v: Tensor, rules: BlockRules) -> tuple[Tensor, Tensor]:
    """Torch's flash kernel where it can, else `attention_blocks.attention_block`."""
    if not _suits_flash(q, k, rules):
        return attention_blocks.attention_block.function(q, k, v, rules)  # type: ignore[no-any-return]
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)), 0.0, rules.distance == 0, False, scale=rules.scale
    )
    return found[0].permute(2, 0, 1, 3), found[1]


@implements(reference.attention_block_backward, name="flash", tolerance=portable.ATTENTION_TOLERANCE)
def attention_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, normalizers: Tensor, rules: BlockRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's flash kernel where it can, else `attention_blocks.attention_block_backward`."""
    if not _suits_flash(q, k, rules):
        portable_form = attention_blocks.attention_block_backward.function
        return portable_form(grad, q, k, v, result, normalizers, rules)  # type: ignore[no-any-return]
    arguments = (x.permute(1, 2, 0, 3) for x in (grad, q, k, v, result))
    one_length, no_dropout = (None, None), 0.0
    random_state = (q.new_zeros(2, dtype=torch.uint64), q.new_zeros((), dtype=torch.uint64))  # read with dropout only
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *arguments,
        normalizers,
        *one_length,
        q.shape[0],
        k.shape[0],
        no_dropout,
        rules.distance == 0,
        *random_state,
        scale=rules.scale,
    )
    grad_q, grad_k, grad_v = (x.permute(2, 0, 1, 3) for x in found)
    return grad_q, grad_k, grad_v


def _suits_flash(q: Tensor, k: Tensor, rules: BlockRules) -> bool:
    """Whether the kernels have these types, sizes and rules."""
    plain = rules.alibi_slopes is None and rules.query_documents is None and rules.window is None
    causal = rules.distance == 0 and q.shape[0] == k.shape[0]
    sized = q.shape[-1] <= _LARGEST_HEAD and q.shape[-1] % _HEAD_STEP == 0
    half = q.dtype in (torch.bfloat16, torch.float16)
    return plain and sized and half and (causal or rules.distance >= k.shape[0] - 1 > 0)
