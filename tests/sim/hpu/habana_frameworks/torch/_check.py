"""Argument rules of the fused functions. The real ones check fewer."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class WrongCallError(ValueError):
    """A call that the vendor's documentation or its published users do not allow."""


def require(truth: bool, message: str) -> None:
    """Raise WrongCallError unless `truth`."""
    if not truth:
        raise WrongCallError(message)


def floats(**tensors: Tensor | None) -> None:
    """All given tensors have one and the same of the supported dtypes."""
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    require(len(set(given.values())) == 1, f"dtypes must agree: {given}")
    require(next(iter(given.values())) in FLOATS, f"unsupported dtype: {given}")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, is_causal: bool, mode: str) -> None:
    """[b, n, s, d]; kv heads divide query heads; a mask is additive and excludes is_causal."""
    floats(q=q, k=k, v=v, attn_mask=mask)
    require(q.dim() == k.dim() == v.dim() == 4, "q, k and v must have 4 dimensions")
    require(k.shape[:3] == v.shape[:3], f"k {tuple(k.shape)} and v {tuple(v.shape)} must agree")
    require(q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3], f"q {tuple(q.shape)} and k {tuple(k.shape)}")
    require(q.shape[1] % k.shape[1] == 0, f"{k.shape[1]} kv heads must divide {q.shape[1]}")
    require(0.0 <= p < 1.0, f"dropout_p {p}")
    require(mode in ("none", "fast"), f"softmax_mode {mode!r}")
    require(mask is None or not is_causal, "attn_mask and is_causal exclude each other")
    if mask is not None:
        shape = (*q.shape[:3], k.shape[2])
        fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True))
        require(fits, f"attn_mask {tuple(mask.shape)} does not broadcast to {shape}")


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> None:
    """Gamma has x's dtype and the length of its last dimension."""
    floats(data_in=x, gamma=gamma)
    require(gamma.shape == x.shape[-1:], f"gamma {tuple(gamma.shape)} must be {tuple(x.shape[-1:])}")
    require(isinstance(eps, float) and eps > 0, f"eps {eps!r}")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, offset: int) -> None:
    """X [s, b, n, d], cos and sin [s, 1, 1, d] (or [s, b, 1, d] for the pairwise form), all channels rotate."""
    floats(p=x, cos=cos, sin=sin)
    require(x.dim() == cos.dim() == sin.dim() == 4 and cos.shape == sin.shape, "p, cos and sin must have 4 dimensions")
    fits = cos.shape[0] == x.shape[0] and cos.shape[1] in (1, x.shape[1]) and cos.shape[2] == 1
    require(fits and cos.shape[3] == x.shape[3], f"cos {tuple(cos.shape)} does not fit p {tuple(x.shape)}")
    require(x.shape[3] % 2 == 0, f"{x.shape[3]} channels: must be even")
    require(position_ids is None and offset == 0, "the simulation has neither position_ids nor offset")
