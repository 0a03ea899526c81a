"""What the operators compute, in plain torch on host tensors, forward and backward written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attention weights, row maximum and reciprocal row sum, in float32; leading dimensions broadcast."""
    scores = q.float() @ k.float().mT * scale
    if mask is not None:
        scores = scores + mask.float()
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    m = scores.amax(-1, keepdim=True)
    exponentials = (scores - m).exp()
    linv = exponentials.sum(-1, keepdim=True).reciprocal()
    return exponentials * linv, m, linv


def _dropout(weights: Tensor, p: float, seed: int) -> Tensor:
    """Factors of the weights: 0, or 1 / (1 - p)."""
    kept = torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed)) >= p
    return kept / (1.0 - p)


def _seed(p: float) -> int:
    return int(torch.randint(2**31, ())) if p > 0.0 else 0


def _summed_to(grad: Tensor, like: Tensor) -> Tensor:
    """Undo broadcasting."""
    axes = [axis for axis in range(grad.dim()) if like.shape[axis] == 1 and grad.shape[axis] != 1]
    return (grad.sum(axes, keepdim=True) if axes else grad).to(like.dtype)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, dropped: Tensor | float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    g = grad.float()
    dv = (weights * dropped).mT @ g
    dw = (g @ v.float().mT) * dropped
    ds = weights * (dw - (dw * weights).sum(-1, keepdim=True)) * scale
    return _summed_to(ds @ k.float(), q), _summed_to(ds.mT @ q.float(), k), _summed_to(dv, v)


def sdpa_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    p: float,
    scale: float,
    is_causal: bool,
    softmax_mode: str,
    valid_seq_len: Tensor | None,
    seq_padding_type: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, weights, and dropout factors (empty without dropout)."""
    weights, _, _ = _weights(q, k, attention_mask, scale, is_causal)
    factors = _dropout(weights, p, _seed(p)) if p > 0.0 else torch.ones(())
    result = (weights * factors) @ v.float()
    return result.to(q.dtype), weights, factors if p > 0.0 else q.new_empty(0)


def sdpa_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    P: Tensor,
    dm: Tensor | None,
    is_causal: bool,
    p: float,
    scale: float,
    fwd_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the kept weights."""
    return _gradients(grad, q, k, v, P, dm if p > 0.0 and dm is not None else 1.0, scale)


def sdpa_recomp_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    p: float,
    scale: float,
    is_causal: bool,
    requires_backward: bool,
    softmax_mode: str,
    valid_seq_len: Tensor | None,
    seq_padding_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result, row maxima, reciprocal row sums, and the seed of the dropout."""
    weights, m, linv = _weights(q, k, attention_mask, scale, is_causal)
    seed = _seed(p)
    factors = _dropout(weights, p, seed) if p > 0.0 else 1.0
    return ((weights * factors) @ v.float()).to(q.dtype), m, linv, torch.tensor([seed])


def sdpa_recomp_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    m: Tensor,
    linv: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    p: float,
    scale: float,
    softmax_mode: str,
    fwd_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with the weights computed anew."""
    weights, _, _ = _weights(q, k, attention_mask, scale, is_causal)
    factors = _dropout(weights, p, int(seed)) if p > 0.0 and seed is not None else 1.0
    return _gradients(grad, q, k, v, weights, factors, scale)


def rms_norm(data_in: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Result and reciprocal root mean square [..., 1] in float32."""
    inverse_rms = data_in.float().pow(2).mean(-1, keepdim=True).add(epsilon).rsqrt()
    return (data_in.float() * inverse_rms * gamma.float()).to(data_in.dtype), inverse_rms


def rms_norm_backward(
    grad_in: Tensor, data_in: Tensor, gamma: Tensor, inverse_rms: Tensor, use_stages: bool, bwd_mode: int
) -> tuple[Tensor, Tensor]:
    """Gradients of data_in and gamma."""
    normed, grad = data_in.float() * inverse_rms, grad_in.float()
    scaled = grad * gamma.float()
    dx = inverse_rms * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(data_in.dtype), (grad * normed).flatten(0, -2).sum(0).to(gamma.dtype)


def _turn(x: Tensor, mode: int) -> Tensor:
    if mode == 0:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotary_pos_embedding(
    input: Tensor,
    sin: Tensor,
    cos: Tensor,
    position_ids: Tensor | None,
    offset: int,
    mode: int,
) -> Tensor:
    """input * cos + turned(input) * sin; mode 0 turns halves, 1 pairs."""
    wide = input.float()
    return (wide * cos.float() + _turn(wide, mode) * sin.float()).to(input.dtype)


def rotary_pos_embedding_backward(
    grad_in: Tensor, sin: Tensor, cos: Tensor, position_ids: Tensor | None, offset: int, mode: int
) -> Tensor:
    """The rotation backwards."""
    wide = grad_in.float()
    return (wide * cos.float() - _turn(wide * sin.float(), mode)).to(grad_in.dtype)


def optimizer_adamw(
    gradients: list[Tensor],
    weights: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    neg_step_t: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: Tensor | float,
    *_: object,
) -> None:
    """w = decay * w + neg_step * m / (sqrt(v) + eps), with the moments updated first; `weight_decay` is the factor."""
    for g, w, m, v in zip(gradients, weights, exp_avg, exp_avg_sq, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w.mul_(weight_decay).add_(neg_step_t * m / (v.sqrt() + epsilon))


def fused_clip_norm(grad: list[Tensor], max_norm: Tensor, norm_type: float) -> Tensor:
    """Scale the gradients down to the norm, in place. The last of the list is a place for the norm that is returned."""
    *gradients, place = grad
    total = torch.stack([g.float().norm(norm_type) for g in gradients]).norm(norm_type)
    factor = (max_norm.float() / (total + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor.to(g.dtype))
    place.fill_(total)
    return total.reshape(1).to(place.dtype)


def cast_to_fp8_v2(
    input: Tensor,
    scale: Tensor | None = None,
    stochastic_rounding: bool = False,
    is_amax: bool = False,
    dtype: torch.dtype = torch.float8_e5m2,
    scale_shape: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The scaled numbers in 8 bits, too large ones as the largest, and the largest absolute value if asked for."""
    largest = {torch.float8_e5m2: 57344.0, torch.float8_e4m3fn: 240.0}[dtype]
    scaled = input.float() * (1.0 if scale is None else scale.float())
    amax = input.abs().amax().float() if is_amax else torch.zeros(())
    return scaled.clamp(-largest, largest).to(dtype), amax


def fp8_gemm_v2(
    a: Tensor,
    turn_a: bool,
    b: Tensor,
    turn_b: bool,
    d: Tensor | None,
    out_dtype: torch.dtype,
    a_scale_inv: Tensor | None = None,
    b_scale_inv: Tensor | None = None,
    bias: Tensor | None = None,
    accumulate: bool = False,
    b_scale_shape: list[int] | None = None,
) -> Tensor:
    """The product of 8-bit matrices, rescaled, in float32 inside."""
    product = (a.float().mT if turn_a else a.float()) @ (b.float().mT if turn_b else b.float())
    for factor in (a_scale_inv, b_scale_inv):
        product = product if factor is None else product * factor
    return (product if bias is None else product + bias.float()).to(out_dtype)
