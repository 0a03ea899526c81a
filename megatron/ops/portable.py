"""Faster forms of operations in plain torch that any device can list among its implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import reference
from megatron.ops.registry import ADAMW_TOLERANCE, TOLERANCE, implements

ATTENTION_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({**TOLERANCE, torch.bfloat16: 3e-2})
"""Kernels round scores or weights to bfloat16 between the two products; softmax is float32 inside."""


@implements(reference.embedding, name="torch")
def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """The kernel of torch, for devices on which it sums gradients in float32; CPUs sum in the dtype of the weight."""
    return F.embedding(ids, weight)


@implements(reference.embedding, name="float32_sums")
def embedding_float32_sums(weight: Tensor, ids: Tensor) -> Tensor:
    """Sums the gradients of each row in float32, whatever the dtype of the weight."""
    result: Tensor = _Embedding.apply(weight, ids)  # type: ignore[no-untyped-call]
    return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        sums = torch.zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
        rows = grad.reshape(-1, grad.shape[-1]).to(sums.dtype)
        return sums.index_add_(0, ids.flatten(), rows).to(grad.dtype), None


@implements(reference.layer_norm, name="lean")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Torch's fused kernels, but for the gradients of weight and bias in 16-bit types: see `_LayerNorm`."""
    result: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return result


class _LayerNorm(torch.autograd.Function):
    """torch's CPU kernel adds up the 16-bit gradients of weight and bias in 16 bits: 15 % off at 8192 rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        shift = None if bias is None else bias.to(x.dtype)
        result, mean, scale = torch.native_layer_norm(x, x.shape[-1:], weight.to(x.dtype), shift, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        shift = None if bias is None else bias.to(x.dtype)
        sums_here = x.dtype.itemsize < torch.float32.itemsize
        wanted = [True, not sums_here, not sums_here and bias is not None]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, x.shape[-1:], mean, scale, weight.to(x.dtype), shift, wanted
        )
        if sums_here:
            normed = (x - mean.to(torch.float32)).mul_(scale.to(torch.float32))
            grad_weight = normed.mul_(grad).flatten(0, -2).sum(dim=0)
            grad_bias = grad.flatten(0, -2).sum(dim=0, dtype=torch.float32)
        return grad_x, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None


@implements(reference.rms_norm, name="lean")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One autograd function that saves x and one number per row."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = (x * scale).mul_(weight).to(x.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (normed * grad).flatten(0, -2).sum(dim=0).to(weight.dtype)
        grad_normed = (grad * weight).to(normed.dtype)
        along = torch.linalg.vecdot(grad_normed, normed).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = grad_normed.sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


@implements(reference.rotary, name="lean")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates into one new tensor; the backward pass is the opposite rotation and needs no saved activation."""
    result: Tensor = _Rotary.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]
    return result


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.interleaved), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    channels = cos.shape[-1]
    if interleaved:
        first, second = slice(0, channels, 2), slice(1, channels, 2)
    else:
        first, second = slice(0, channels // 2), slice(channels // 2, channels)
    # In the tables' dtype from end to end: one conversion in and one out are cheaper than mixed arithmetic.
    turned = x[..., :channels].to(torch.promote_types(x.dtype, cos.dtype))
    result = turned * cos
    result[..., first].addcmul_(turned[..., second], sin[..., first], value=-1)
    result[..., second].addcmul_(turned[..., first], sin[..., second])
    if channels == x.shape[-1]:
        return result.to(x.dtype)
    return torch.cat((result.to(x.dtype), x[..., channels:]), -1)


@implements(reference.attention, name="sdpa", tolerance=ATTENTION_TOLERANCE)
def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; torch picks flash, cuDNN, memory-efficient or plain maths.

    ALiBi, documents and windows need an explicit mask [s, s], which excludes the flash kernels.
    """
    mask = None
    if alibi_slopes is not None or document_ids is not None or window is not None:
        mask = _sdpa_mask(q, alibi_slopes, document_ids, window)
    result = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        k.permute(1, 2, 0, 3),
        v.permute(1, 2, 0, 3),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return result.permute(2, 0, 1, 3)


def _sdpa_mask(q: Tensor, alibi_slopes: Tensor | None, document_ids: Tensor | None, window: int | None) -> Tensor:
    """Bool mask [s, s] or [b, 1, s, s], or with ALiBi an additive one [1 or b, n, s, s] in q's dtype."""
    visible = reference.visible_keys(q.shape[0], q.device, document_ids=document_ids, window=window)
    if alibi_slopes is None:
        return visible
    positions = torch.arange(q.shape[0], device=q.device)
    # Softmax does not see a shift per row: distances instead of positions survive rounding to 16 bits.
    bias = alibi_slopes[:, None, None] * (positions - positions[:, None])
    return bias.masked_fill(~visible, float("-inf")).to(q.dtype)


@implements(reference.swiglu, name="lean")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Saves gate and up only, not silu(gate); silu(gate) is rounded to gate's dtype."""
    result: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate: Tensor = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


@implements(reference.geglu, name="lean")
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Saves gate and up only, not gelu(gate); gelu(gate) is rounded to gate's dtype."""
    result: Tensor = _GeGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.gelu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate: Tensor = torch.ops.aten.gelu_backward(grad * up, gate)
        return grad_gate, F.gelu(gate).mul_(grad)


@implements(reference.grouped_matmul, name="loop")
def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One product per group, written to its place in the result; keeps x and weight alone."""
    result: Tensor = _GroupedMatmul.apply(x, weight, counts)  # type: ignore[no-untyped-call]
    return result


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = counts.tolist()
        result = x.new_empty(x.shape[0], weight.shape[1])
        for rows, matrix, out in zip(_split(x, ctx), weight, _split(result, ctx), strict=True):
            torch.mm(rows, matrix.t(), out=out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grads = _split(grad, ctx)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for part, matrix, out in zip(grads, weight, _split(grad_x, ctx), strict=True):
                torch.mm(part, matrix, out=out)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for part, rows, out in zip(grads, _split(x, ctx), grad_weight, strict=True):
                torch.mm(part.t(), rows, out=out)
        return grad_x, grad_weight, None


def _split(rows: Tensor, ctx: Any) -> tuple[Tensor, ...]:
    """The rows of each group."""
    return torch.split(rows, ctx.sizes)


@implements(reference.bias_gelu, name="torch")
def bias_gelu(x: Tensor, bias: Tensor | None, approximate: Literal["none", "tanh"]) -> Tensor:
    """Torch's gelu on x + bias in x's dtype, so that no float32 copy is kept for the backward pass."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def chunked_cross_entropy(logits: Tensor, labels: Tensor, chunk_elements: int) -> Tensor:
    """`reference.cross_entropy` with float32 arithmetic but no float32 copy of all logits, in either direction.

    The backward pass needs the logits and one number per token, and makes the gradient in the logits' dtype.

    Args:
        logits: [..., v].
        labels: [...] int64.
        chunk_elements: logits that are handled, and held in float32, at a time.

    Returns:
        [...] float32.
    """
    result: Tensor = _ChunkedCrossEntropy.apply(logits, labels, chunk_elements)  # type: ignore[no-untyped-call]
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, chunk_elements: int) -> Tensor:
        rows, targets = logits.flatten(0, -2), labels.flatten()[:, None]
        wide = torch.promote_types(logits.dtype, torch.float32)
        normalizer = torch.empty_like(targets, dtype=wide)
        for chunk in _row_chunks(rows, chunk_elements):
            scores = rows[chunk].to(wide, copy=True)
            largest = scores.amax(dim=-1, keepdim=True)
            normalizer[chunk] = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True).log_().add_(largest)
        ctx.save_for_backward(logits, labels, normalizer)
        ctx.chunk_elements = chunk_elements
        return (normalizer - rows.gather(1, targets)).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, normalizer = ctx.saved_tensors
        rows, targets, grad_rows = logits.flatten(0, -2), labels.flatten()[:, None], grad.flatten()[:, None]
        grad_logits = torch.empty_like(rows)
        for chunk in _row_chunks(rows, ctx.chunk_elements):
            probabilities = torch.sub(rows[chunk], normalizer[chunk]).exp_()
            probabilities.scatter_add_(1, targets[chunk], torch.full_like(normalizer[chunk], -1.0))
            grad_logits[chunk] = probabilities.mul_(grad_rows[chunk])
        return grad_logits.view(logits.shape), None, None


def _row_chunks(rows: Tensor, chunk_elements: int) -> Iterable[slice]:
    step = max(1, chunk_elements // rows.shape[1])
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


@implements(reference.matmul_all_reduce, name="torch")
def matmul_all_reduce(x: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The product, then the sum of the ranks' products, which travel in x's dtype."""
    product = F.linear(x, weight)
    if group is not None:
        dist.all_reduce(product, group=group)
    return product


@implements(reference.adamw, name="fused", tolerance=ADAMW_TOLERANCE)
def adamw(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Torch's AdamW with one kernel for the whole update."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


@implements(reference.clip_grad_norm, name="foreach")
def clip_grad_norm(
    gradients: Mapping[int, Sequence[Tensor]],
    device: torch.device,
    *,
    limit: float,
    scale: float = 1.0,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A few kernels for many gradients at a time, and nothing that waits for the device."""
    filled = {copies: [part for part in group if part.numel()] for copies, group in gradients.items()}
    squares = [torch.stack(_norms(group)).square().sum() / copies for copies, group in filled.items() if group]
    square = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
    norm = (square if sum_over_ranks is None else sum_over_ranks(square)).sqrt() / scale
    factor = reference.clip_factor(norm, limit) / scale
    for group in filled.values():
        if group:
            torch._foreach_mul_(group, factor)
    return norm


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each, in at least float32."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return list(torch._foreach_norm(list(tensors), 2.0, dtype=wide))
