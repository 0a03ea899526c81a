"""SIMULATION: torch's fused attention becomes the vendor's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from habana_frameworks.torch.hpex.kernels import FusedSDPA
from tests.sim.redirect import Seen

_NAME = "torch.nn.functional.scaled_dot_product_attention"


def scaled_dot_product_attention(seen: Seen) -> Callable[..., Tensor]:
    """The function that takes the place of torch's; `seen` is told about its calls."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        seen("modified", _NAME, f"{_NAME}(...)", "habana_frameworks.torch.hpex.kernels.FusedSDPA.apply(...)")
        if attn_mask is not None:  # torch's function takes masks with fewer dimensions, the kernel does not
            attn_mask = attn_mask[(None,) * (query.dim() - attn_mask.dim())]
        return FusedSDPA.apply(query, key, value, attn_mask, dropout_p, is_causal, scale)

    return attention
