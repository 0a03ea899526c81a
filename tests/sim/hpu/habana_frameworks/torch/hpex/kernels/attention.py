"""SIMULATION of FusedSDPA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from habana_frameworks.torch import _check, hpu


class FusedSDPA(torch.autograd.Function):
    """`apply` with up to 13 positional arguments; see `forward`. q [b, n, s, d], k and v [b, g, s, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        softmax_mode: str = "None",
        recompute_mode: bool | None = None,
        valid_seq_len: Tensor | None = None,
        seq_padding_type: str = "left",
        return_dropout_mask: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        mode, padding = softmax_mode.lower(), seq_padding_type.lower()
        needs_backward = q.requires_grad or k.requires_grad or v.requires_grad
        recompute = hpu.recompute_sdp_enabled() if recompute_mode is None else recompute_mode
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        _check.attention(q, k, v, attn_mask, dropout_p, is_causal, mode)
        _check.require(
            is_causal or not (recompute and needs_backward and mode == "fast"), "fast recompute training is causal only"
        )
        _check.require(valid_seq_len is None and not return_dropout_mask, "the simulation has no valid_seq_len")
        _check.require(not return_attn_probs, "the simulation returns no attention weights")
        grouped = k.shape[1] not in (1, q.shape[1])
        if grouped:
            q, k, v, attn_mask = _by_group(q, k, v, attn_mask)
        common = (q, k, v, attn_mask, dropout_p, scale, is_causal)
        if recompute:
            out, *kept = torch.ops.hpu.sdpa_recomp_fwd(*common, needs_backward, mode, None, padding)
        else:
            out, *kept = torch.ops.hpu.sdpa_fwd(*common, mode, None, padding)
        ctx.save_for_backward(q, k, v, attn_mask, out, *kept)
        ctx.settings = dropout_p, scale, is_causal, mode, recompute, grouped
        return out.flatten(1, 2) if grouped else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, *kept = ctx.saved_tensors
        p, scale, is_causal, mode, recompute, grouped = ctx.settings
        dout = dout.reshape(out.shape)
        if recompute:
            grads = torch.ops.hpu.sdpa_recomp_bwd(dout, q, k, v, mask, *kept, is_causal, p, scale, mode, out)
        else:
            grads = torch.ops.hpu.sdpa_bwd(dout, q, k, v, *kept, is_causal, p, scale, out)
        if grouped:
            grads = tuple(grad.flatten(1, 2) for grad in grads)
        return (*grads, *(None for _ in range(10)))


def _by_group(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Heads as (kv head, query head of it): q [b, g, n/g, s, d], k and v [b, g, 1, s, d]."""
    groups = k.shape[1]
    if mask is not None:
        mask = mask.unflatten(1, (groups, -1)) if mask.shape[1] == q.shape[1] else mask.unsqueeze(1)
    return q.unflatten(1, (groups, -1)), k.unsqueeze(2), v.unsqueeze(2), mask
