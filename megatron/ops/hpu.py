"""What Intel Gaudi runs, in order of preference per operation. Figures and sources: docs/simulated-devices.md.

Contracts of the fused functions: `habana_frameworks.torch.hpex` as published in gaudi-pytorch-bridge 1.19. They check
few of their arguments, so each call stands behind checks of our own. Operators without a kernel on the card run on the
host without a word: nothing listed here uses one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron.ops import attention_blocks, cached_attention, hpu_linear, linear_cross_entropy, portable, reference
from megatron.ops.compiled_adamw import Batch, CompiledAdamW
from megatron.ops.float8 import Formats, Product
from megatron.ops.registry import ADAMW_TOLERANCE, TOLERANCE, Implementation, implements

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK_LOGITS = 2**26
"""A quarter GiB of float32 logits at a time: large enough to fill the card, small beside the logits themselves."""

_CARD_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({dtype: TOLERANCE[dtype] for dtype in _FLOATS})
_SDPA_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {dtype: portable.ATTENTION_TOLERANCE[dtype] for dtype in _FLOATS}
)
_ENGINE_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(dict.fromkeys(_FLOATS, 0.125))
"""In backward the engine has inputs and weights in E5M2, where rounding changes a number by up to an eighth."""
_FAST_SDPA_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({torch.bfloat16: 5e-2, torch.float16: 2e-2})
"""The fast softmax approximates the exponential function and works in 16 bits only."""


def _unavailable() -> str:
    return "" if find_spec("habana_frameworks") is not None else "python package habana_frameworks is not installed"


def _check_dtype(what: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"{what} computes in {', '.join(map(str, _FLOATS))}, not in {x.dtype}")


def additive_mask(q: Tensor, alibi_slopes: Tensor | None, document_ids: Tensor | None, window: int | None) -> Tensor:
    """What is added to the scores: 0 or the ALiBi bias where a query sees a key, the lowest number where it does not.

    Args:
        q: [s, b, n, d].
        alibi_slopes: [n], see `reference.attention`.
        document_ids: [b, s], likewise.
        window: likewise.

    Returns:
        [1 or b, 1 or n, s, s] in q's dtype.
    """
    visible = reference.visible_keys(q.shape[0], q.device, document_ids=document_ids, window=window)
    bias = torch.zeros((), dtype=torch.float32, device=q.device)
    if alibi_slopes is not None:
        positions = torch.arange(q.shape[0], device=q.device)
        # Softmax does not see a shift per row: distances instead of positions survive rounding to 16 bits.
        bias = alibi_slopes.float()[:, None, None] * (positions - positions[:, None])
    mask = torch.where(visible, bias, torch.finfo(q.dtype).min).to(q.dtype)
    return mask[(None,) * (4 - mask.dim())]


def _fused_sdpa(name: str, *, fast: bool, recompute: bool) -> Implementation:
    """One form of `FusedSDPA`: with exact or fast softmax, keeping the attention weights or computing them again."""

    @implements(
        reference.attention,
        name=name,
        tolerance=_FAST_SDPA_TOLERANCE if fast else _SDPA_TOLERANCE,
        why_unavailable=_unavailable,
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
    ) -> Tensor:
        """Gaudi's fused attention; ALiBi, documents and windows are passed as a mask [s, s].

        The fast softmax with recomputation is for plain causal attention; with a mask the exact one takes its place.
        """
        from habana_frameworks.torch.hpex.kernels import FusedSDPA

        _check_dtype(f"--op attention={name}", q)
        masked = alibi_slopes is not None or document_ids is not None or window is not None
        mask = additive_mask(q, alibi_slopes, document_ids, window) if masked else None
        if dropout_p > 0.0 and k.shape[2] not in (1, q.shape[2]):
            # The fused kernel draws dropout for one query head per kv head.
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        result: Tensor = FusedSDPA.apply(
            q.permute(1, 2, 0, 3),
            k.permute(1, 2, 0, 3),
            v.permute(1, 2, 0, 3),
            mask,
            dropout_p,
            not masked,
            scale,
            "fast" if fast and not (recompute and masked) else "None",
            recompute,
        )
        return result.permute(2, 0, 1, 3)

    return attention


@implements(reference.rms_norm, name="fused", tolerance=_CARD_TOLERANCE, why_unavailable=_unavailable)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gaudi's fused RMSNorm; weight is read in x's dtype, arithmetic is float32 inside."""
    from habana_frameworks.torch.hpex.normalization import FusedRMSNorm

    _check_dtype("--op rms_norm=fused", x)
    result: Tensor = FusedRMSNorm.apply(x, weight.to(x.dtype), eps)
    return result


@implements(reference.rotary, name="fused", tolerance=_CARD_TOLERANCE, why_unavailable=_unavailable)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Gaudi's fused rotation, in the wider of the two dtypes."""
    _check_dtype("--op rotary=fused", x)
    turn = _rotate_pairs if interleaved else _rotate_halves
    if cos.shape[1] > 1:  # the kernel has one table for all sequences
        own = [slice(i, i + 1) for i in range(x.shape[1])]
        return torch.cat([turn(x[:, i], cos[:, i], sin[:, i]) for i in own], dim=1)
    return turn(x, cos, sin)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X [s, b, n, d], cos and sin [s, 1, 1, r]; channels j and j + r/2 form a pair."""
    from habana_frameworks.torch.hpex.kernels import RotaryPosEmbeddingHelperV1

    channels = cos.shape[-1]
    rotated: Tensor = RotaryPosEmbeddingHelperV1.apply(x[..., :channels], cos, sin, 0)
    rotated = rotated.to(x.dtype)
    return rotated if channels == x.shape[-1] else torch.cat((rotated, x[..., channels:]), dim=-1)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X [s, b, n, d], cos and sin [s, 1, 1, r]; channels 2j and 2j + 1 form a pair. Passes channels from r on."""
    from habana_frameworks.torch.hpex.kernels import RotaryPosEmbeddingHelperV3

    table = torch.stack((cos[:, :, 0, ::2], sin[:, :, 0, ::2]), dim=-1)
    result: Tensor = RotaryPosEmbeddingHelperV3.apply(x, table)
    return result


@implements(reference.cross_entropy, name="chunked")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """No float32 copy of all logits, see `portable.chunked_cross_entropy`."""
    return portable.chunked_cross_entropy(logits, labels, _CHUNK_LOGITS)


class GaudiAdamW(CompiledAdamW):
    """AdamW through Gaudi's kernel, with the state of torch.optim.AdamW.

    The vendor's own optimizer over this kernel counts its steps per group and keeps 0 in the state of each parameter: a
    checkpoint of one optimizer restarts the bias correction of the other. Here `step` is in the state of the parameter
    and nowhere else.

    The kernel adds eps to the root of the second moment before the bias of that is corrected, and would be compiled
    anew for every value of eps. So eps is corrected, too, but to the nearest power of two: in the first steps it is off
    by a factor of at most 1.4, where the vendor's optimizer is off by up to 30, and the kernel is compiled a few times.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have a gradient, which ends the graph in lazy mode."""
        from habana_frameworks.torch import core
        from habana_frameworks.torch.utils.internal import is_lazy

        loss = super().step(closure)
        if is_lazy():
            core.mark_step()
        return loss

    def update(self, batch: Batch) -> None:
        """Update moments and weights in one kernel; how it takes the decay differs between the two modes."""
        from habana_frameworks.torch.utils.internal import is_lazy

        step, kept = batch.on_device(-batch.step_size * batch.correction, batch.kept).unsqueeze(1)
        torch.ops.hpu.optimizer_adamw(
            batch.gradients,
            batch.weights,
            batch.exp_avg,
            batch.exp_avg_sq,
            step,
            *batch.betas,
            batch.eps * 2.0 ** round(math.log2(batch.correction)),
            *((batch.kept,) if is_lazy() else (kept, batch.kept != 1.0)),
            None,
            None,
        )


@implements(reference.adamw, name="fused", tolerance=ADAMW_TOLERANCE, why_unavailable=_unavailable)
def adamw(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Gaudi's AdamW kernel for many parameters at once; see `GaudiAdamW`."""
    return GaudiAdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@implements(reference.clip_grad_norm, name="fused", why_unavailable=_unavailable)
def clip_grad_norm(
    gradients: Mapping[int, Sequence[Tensor]],
    device: torch.device,
    *,
    limit: float,
    scale: float = 1.0,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Gaudi's fused norm and clipping, which sees the gradients of one rank: for a rank that has all of them."""
    parts = [part for group in gradients.values() for part in group if part.numel()]
    alike = len({part.dtype for part in parts}) == 1
    if sum_over_ranks is not None or scale != 1.0 or limit == 0.0 or set(gradients) != {1} or not alike:
        return portable.clip_grad_norm.function(  # type: ignore[no-any-return]
            gradients, device, limit=limit, scale=scale, sum_over_ranks=sum_over_ranks
        )
    place = parts[0].new_zeros(1)  # the kernel returns the norm in the last of its tensors
    norm: Tensor = torch.ops.hpu.fused_clip_norm([*parts, place], parts[0].new_full((1,), limit), 2.0)
    return norm.float().reshape(())


@implements(
    reference.make_linear,
    name="transformer_engine",
    tolerance=_ENGINE_TOLERANCE,
    why_unavailable=hpu_linear.unavailable,
)
def make_linear(in_features: int, out_features: int, formats: Formats) -> Product:
    """See `hpu_linear`."""
    return hpu_linear.make(in_features, out_features, formats)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    _fused_sdpa("fused_sdpa", fast=False, recompute=False),
    _fused_sdpa("fused_sdpa_recompute", fast=False, recompute=True),
    _fused_sdpa("fused_sdpa_fast", fast=True, recompute=False),
    _fused_sdpa("fused_sdpa_fast_recompute", fast=True, recompute=True),
    cached_attention.cached_attention,
    attention_blocks.attention_block,
    attention_blocks.attention_block_backward,
    portable.embedding_float32_sums,
    rms_norm,
    portable.rms_norm,
    portable.layer_norm,
    rotary,
    portable.rotary,
    portable.swiglu,
    portable.geglu,
    portable.grouped_matmul,
    portable.matmul_all_reduce,
    portable.bias_gelu,
    cross_entropy,
    make_linear,
    clip_grad_norm,
    linear_cross_entropy.linear_cross_entropy,
    portable.clip_grad_norm,
    adamw,
)
