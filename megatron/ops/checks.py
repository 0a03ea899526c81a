"""Argument checks, one function per operation with the operation's own signature.

Vendors' kernels (and torch's shape inference for them) accept wrong shapes and layouts and then compute nonsense, so
every implementation runs behind these. They look at shapes and types only, never at values: no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.ops.block_rules import BlockRules
from megatron.ops.float8 import Formats

_EIGHT_BIT_STEP = 16
"""Matrix units take 8-bit numbers in blocks of 16."""


def _require(truth: bool, message: str) -> None:
    if not truth:
        raise ValueError(message)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")


def _channels(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is not None and tensor.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be {_shape(x)[-1:]} for x {_shape(x)}, not {_shape(tensor)}")


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"shapes must agree: {shapes}")


def _probability(name: str, value: float) -> None:
    _require(0.0 <= value < 1.0, f"{name} must be at least 0 and below 1, not {value}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """X [..., h] floating, weight [h]."""
    _floating(x=x)
    _channels("weight", weight, x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """X [..., h] floating, weight and bias [h]."""
    _floating(x=x)
    _channels("weight", weight, x)
    _channels("bias", bias, x)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """X [s, b, n, d] floating, cos and sin [s, b or 1, 1, r] with r even and at most d."""
    _floating(x=x, cos=cos, sin=sin)
    _same_shape(cos=cos, sin=sin)
    _require(x.dim() == 4 and cos.dim() == 4, f"x and cos must have 4 dimensions: x {_shape(x)}, cos {_shape(cos)}")
    fits = cos.shape[0] == x.shape[0] and cos.shape[1] in (1, x.shape[1]) and cos.shape[2] == 1
    _require(fits, f"cos must be [s, b or 1, 1, r] for x {_shape(x)}, not {_shape(cos)}")
    channels = cos.shape[3]
    _require(
        channels % 2 == 0 and 0 < channels <= x.shape[3],
        f"rotated channels must be even and at most {x.shape[3]}, not {channels}",
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Q [s, b, n, d], k and v [s, b, g, d] of one type, g divides n; slopes [n], document_ids [b, s]."""
    _require(q.dim() == 4, f"q must be [s, b, n, d], not {_shape(q)}")
    s, b = q.shape[:2]
    _queries_and_keys(q, k, v, s, alibi_slopes, window)
    if document_ids is not None:
        _require(document_ids.shape == (b, s), f"document_ids must be [{b}, {s}], not {_shape(document_ids)}")
    _probability("dropout_p", dropout_p)


def _queries_and_keys(
    q: Tensor, k: Tensor, v: Tensor, slots: int | None, alibi_slopes: Tensor | None, window: int | None
) -> None:
    """Q [., b, n, d], k and v [slots, b, g, d] (None: any number) of one type, g divides n; slopes [n]."""
    _floating(q=q)
    _require(q.dtype == k.dtype == v.dtype, f"q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    _require(q.dim() == 4 and k.dim() == 4, f"q and k must have 4 dimensions: q {_shape(q)}, k {_shape(k)}")
    _same_shape(k=k, v=v)
    (_, b, n, d), (t, _, g, _) = q.shape, k.shape
    _require(
        k.shape == (slots or t, b, g, d) and g > 0 and n % g == 0,
        f"k and v must be [{slots or 't'}, {b}, g, {d}] with g dividing {n}, not {_shape(k)}",
    )
    if alibi_slopes is not None:
        _require(alibi_slopes.shape == (n,), f"alibi_slopes must be [{n}], not {_shape(alibi_slopes)}")
    _require(window is None or window >= 1, f"window must be at least 1, not {window}")


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
) -> None:
    """Q [r, b, n, d], k and v [t, b, g, d] of one type, g divides n; positions [b, r] int64, slopes [n]."""
    _queries_and_keys(q, k, v, None, alibi_slopes, window)
    fits = positions.dtype == torch.int64 and positions.shape == (q.shape[1], q.shape[0])
    shape = [q.shape[1], q.shape[0]]
    _require(fits, f"positions must be int64 {shape}, not {positions.dtype} {_shape(positions)}")


def attention_block(q: Tensor, k: Tensor, v: Tensor, rules: BlockRules) -> None:
    """Q [s, b, n, d], k and v [t, b, g, d] of one type, g divides n; slopes [n], documents [b, s] and [b, t]."""
    _queries_and_keys(q, k, v, None, rules.alibi_slopes, rules.window)
    (s, b), t = q.shape[:2], k.shape[0]
    _require(rules.distance >= 0, f"distance must be at least 0, not {rules.distance}")
    documents = (rules.query_documents, rules.key_documents)
    _require((documents[0] is None) == (documents[1] is None), "documents of queries and of keys go together")
    for name, ids, length in zip(("query_documents", "key_documents"), documents, (s, t), strict=True):
        if ids is not None:
            _require(ids.shape == (b, length), f"{name} must be [{b}, {length}], not {_shape(ids)}")


def attention_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, normalizers: Tensor, rules: BlockRules
) -> None:
    """As `attention_block`; grad and result like q, normalizers [b, n, s] in at least float32."""
    attention_block(q, k, v, rules)
    _same_shape(grad=grad, q=q, result=result)
    s, b, n, _ = q.shape
    _require(normalizers.shape == (b, n, s), f"normalizers must be [{b}, {n}, {s}], not {_shape(normalizers)}")
    wide = normalizers.dtype in (torch.float32, torch.float64)
    _require(wide, f"normalizers must be float32 or float64, not {normalizers.dtype}")


def swiglu(gate: Tensor, up: Tensor) -> None:
    """Gate and up [..., f] floating."""
    _floating(gate=gate, up=up)
    _same_shape(gate=gate, up=up)


def geglu(gate: Tensor, up: Tensor) -> None:
    """Gate and up [..., f] floating."""
    swiglu(gate, up)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: Literal["none", "tanh"]) -> None:
    """X [..., f] floating, bias [f]."""
    _floating(x=x)
    _channels("bias", bias, x)
    _require(approximate in ("none", "tanh"), f'approximate must be "none" or "tanh", not {approximate!r}')


def embedding(weight: Tensor, ids: Tensor) -> None:
    """Weight [v, h] floating, ids [...] int64."""
    _floating(weight=weight)
    _require(ids.dtype == torch.int64, f"ids must be int64, not {ids.dtype}")
    _require(weight.dim() == 2, f"weight must be [v, h], not {tuple(weight.shape)}")


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> None:
    """X [m, i] and weight [E, o, i] floating and of one dtype, counts [E] int64."""
    _floating(x=x, weight=weight)
    _require(x.dtype == weight.dtype, f"x and weight must have one dtype, not {x.dtype} and {weight.dtype}")
    _require(x.dim() == 2 and weight.dim() == 3, f"x must be [m, i], weight [E, o, i]: {_shape(x)}, {_shape(weight)}")
    _require(x.shape[1] == weight.shape[2], f"weight must be [E, o, {x.shape[1]}], not {_shape(weight)}")
    fits = counts.dtype == torch.int64 and counts.shape == weight.shape[:1]
    _require(fits, f"counts must be int64 [{weight.shape[0]}], not {counts.dtype} {_shape(counts)}")


def matmul_all_reduce(x: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> None:
    """X [..., i] and weight [o, i] floating and of one dtype."""
    _require(weight.dim() == 2, f"weight must be [o, i], not {_shape(weight)}")
    linear_arguments(x, weight, weight.shape[1], weight.shape[0])


def squared_relu(x: Tensor) -> None:
    """X [...] floating."""
    _floating(x=x)


def relu(x: Tensor) -> None:
    """X [...] floating."""
    _floating(x=x)


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, training: bool) -> None:
    """X and residual [..., h] floating, bias [h]."""
    _floating(x=x, residual=residual)
    _same_shape(x=x, residual=residual)
    _channels("bias", bias, x)
    _probability("p", p)


def cross_entropy(logits: Tensor, labels: Tensor) -> None:
    """Logits [..., v] floating, labels [...] int64."""
    _floating(logits=logits)
    _require(labels.dtype == torch.int64, f"labels must be int64, not {labels.dtype}")
    _require(
        logits.shape[:-1] == labels.shape,
        f"labels must be {_shape(logits)[:-1]} for logits {_shape(logits)}, not {_shape(labels)}",
    )


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, rows: int) -> None:
    """X [..., h] and weight [v, h] floating and of one dtype, labels [...] int64, rows at most v."""
    _require(weight.dim() == 2, f"weight must be [v, h], not {_shape(weight)}")
    linear_arguments(x, weight, weight.shape[1], weight.shape[0])
    fits = labels.dtype == torch.int64 and labels.shape == x.shape[:-1]
    _require(fits, f"labels must be int64 {_shape(x)[:-1]}, not {labels.dtype} {_shape(labels)}")
    _require(0 <= rows <= weight.shape[0], f"rows must be 0 to {weight.shape[0]}, not {rows}")


def adamw(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """Rates and eps at least 0, betas in [0, 1)."""
    _require(lr >= 0.0, f"lr must be at least 0, not {lr}")
    _require(eps >= 0.0, f"eps must be at least 0, not {eps}")
    _require(weight_decay >= 0.0, f"weight_decay must be at least 0, not {weight_decay}")
    for beta in betas:
        _probability("beta", beta)


def make_linear(in_features: int, out_features: int, formats: Formats) -> None:
    """Features are multiples of 16."""
    for what, count in (("input", in_features), ("output", out_features)):
        _require(
            count > 0 and count % _EIGHT_BIT_STEP == 0,
            f"--fp8-format: a linear layer has {count} {what} features per tensor-parallel rank; 8-bit products take "
            f"multiples of {_EIGHT_BIT_STEP}",
        )


def linear_arguments(x: Tensor, weight: Tensor, in_features: int, out_features: int) -> None:
    """X [..., i] and weight [o, i] floating and of one dtype."""
    _floating(x=x, weight=weight)
    _require(x.dtype == weight.dtype, f"x and weight must have one dtype, not {x.dtype} and {weight.dtype}")
    fits = x.shape[-1] == in_features and weight.shape == (out_features, in_features)
    shapes = f"{_shape(x)}, {_shape(weight)}"
    _require(fits, f"x must be [..., {in_features}], weight [{out_features}, {in_features}], not {shapes}")


def clip_grad_norm(
    gradients: Mapping[int, Sequence[Tensor]],
    device: torch.device,
    *,
    limit: float,
    scale: float = 1.0,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Numbers of ranks at least 1, limit at least 0, scale above 0."""
    _require(all(copies >= 1 for copies in gradients), f"gradients are held by {list(gradients)} ranks: at least 1")
    _require(limit >= 0.0, f"limit must be at least 0, not {limit}")
    _require(scale > 0.0, f"scale must be above 0, not {scale}")
