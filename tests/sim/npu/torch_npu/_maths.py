"""What the operators compute, in plain torch on host tensors, forward and backward written out by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_npu import _check


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Result and the reciprocal root mean square [..., 1] in float32."""
    _check.rms_norm(x, gamma, epsilon)
    dims = tuple(range(-gamma.dim(), 0))
    rstd = x.float().pow(2).mean(dims, keepdim=True).add(epsilon).rsqrt()
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and gamma."""
    dims = tuple(range(-gamma.dim(), 0))
    normed, grad = x.float() * rstd, dy.float()
    scaled = grad * gamma.float()
    dx = rstd * (scaled - normed * (scaled * normed).mean(dims, keepdim=True))
    outer = tuple(range(x.dim() - gamma.dim()))
    return dx.to(x.dtype), (grad * normed).sum(outer).to(gamma.dtype)


def _turn(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """r1 * x + r2 * turned(x)."""
    _check.require(rotate is None, "the simulation has no rotate matrix")
    _check.rotary(x, r1, r2, rotary_mode)
    return (r1.float() * x.float() + r2.float() * _turn(x.float(), rotary_mode)).to(x.dtype)


def rotary_mul_backward(
    grad: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, r1 and r2."""
    g, wide = grad.float(), x.float()
    dx = r1.float() * g - _turn(r2.float() * g, rotary_mode)
    axes = [axis for axis in range(4) if r1.shape[axis] == 1 and x.shape[axis] != 1]
    dr1, dr2 = (g * wide).sum(axes, keepdim=True), (g * _turn(wide, rotary_mode)).sum(axes, keepdim=True)
    return dx.to(x.dtype), dr1.to(r1.dtype), dr2.to(r2.dtype)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half."""
    _check.swiglu(x, dim)
    gate, up = x.float().chunk(2, dim)
    return (F.silu(gate) * up).to(x.dtype)


def swiglu_backward(grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """Gradient of the joined halves."""
    gate, up = x.float().chunk(2, dim)
    sigmoid, g = gate.sigmoid(), grad.float()
    dgate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((dgate, g * gate * sigmoid), dim).to(x.dtype)


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False) -> Tensor:
    """softmax(scale * x) where the mask is False."""
    _check.scaled_masked_softmax(x, mask, fixed_triu_mask)
    return (x.float() * scale).masked_fill(mask, -10000.0).softmax(-1).to(x.dtype)


def scaled_masked_softmax_backward(
    y_grad: Tensor, y: Tensor, mask: Tensor, scale: float, fixed_triu_mask: bool
) -> Tensor:
    """Gradient of x."""
    g, wide = y_grad.float(), y.float()
    dx = wide * (g - (g * wide).sum(-1, keepdim=True)) * scale
    return dx.masked_fill(mask, 0.0).to(y.dtype)


class Attention(NamedTuple):
    """A fused attention's arguments in one form: q [b, n, s, d], k and v [b, g, t, d], scores to hide, and the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None
    bias: Tensor | float
    scale: float
    keep_prob: float

    def weights(self) -> tuple[Tensor, Tensor]:
        """Attention weights, and the logarithm of the sum of exponentials, both float32."""
        group = self.q.shape[1] // self.k.shape[1]
        scores = self.q.float() @ self.k.float().repeat_interleave(group, 1).mT * self.scale + self.bias
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden, float("-inf"))
        normalizer = scores.logsumexp(-1, keepdim=True)
        return (scores - normalizer).exp(), normalizer

    def dropout(self, like: Tensor, seed: int) -> Tensor | float:
        """Factors of the weights: 0, or one over the probability of being kept."""
        if self.keep_prob == 1:
            return 1.0
        kept = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)) < self.keep_prob
        return kept / self.keep_prob

    def forward(self, seed: int) -> tuple[Tensor, Tensor]:
        """Result [b, n, s, d] and the normalizer."""
        weights, normalizer = self.weights()
        group = self.q.shape[1] // self.k.shape[1]
        values = self.v.float().repeat_interleave(group, 1)
        return (weights * self.dropout(weights, seed)) @ values, normalizer

    def backward(self, grad: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, float32."""
        weights, _ = self.weights()
        group, dropped, g = self.q.shape[1] // self.k.shape[1], self.dropout(weights, seed), grad.float()
        keys, values = (x.float().repeat_interleave(group, 1) for x in (self.k, self.v))
        dv = (weights * dropped).mT @ g
        dw = (g @ values.mT) * dropped
        ds = weights * (dw - (dw * weights).sum(-1, keepdim=True)) * self.scale
        dk = ds.mT @ self.q.float()
        return ds @ keys, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


def to_bnsd(x: Tensor, layout: str, d: int) -> Tensor:
    """Any layout -> [b, n, s, d]."""
    if layout in ("BSH", "SBH"):
        x, layout = x.unflatten(2, (-1, d)), layout.replace("H", "ND")
    return x.permute([layout.index(axis) for axis in "BNSD"])


def from_bnsd(x: Tensor, layout: str) -> Tensor:
    """[b, n, s, d] -> the layout, contiguous."""
    full = layout.replace("H", "ND")
    x = x.permute(["BNSD".index(axis) for axis in full]).contiguous()
    return x.flatten(2) if "H" in layout else x


def hidden_scores(
    mask: Tensor | None, sparse_mode: int, shape: tuple[int, int, int, int], pre: int, following: int
) -> Tensor | None:
    """Which scores are not looked at, as a mask that broadcasts to [b, n, s, t]."""
    _check.attention_mask(mask, sparse_mode, shape)
    _, _, s, t = shape
    if mask is None or sparse_mode in (0, 1):
        return None if mask is None else mask.bool()
    distance = torch.arange(t) - torch.arange(s)[:, None]
    if sparse_mode == 2:
        return distance > 0
    distance = distance - (t - s)  # modes 3 and 4 count from the lower right corner
    return distance > 0 if sparse_mode == 3 else (distance > following) | (distance < -pre)
