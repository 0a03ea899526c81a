"""Numbers of 8 bits: formats, scales and casts, in plain torch.

A tensor is multiplied by a scale, a power of two, so that its largest value comes just below the format's; then it is
rounded, and what is too large becomes the largest number. Scaling by powers of two is exact, so an 8-bit number stands
for the same number at every scale, but for those that are too large or too small for it.
Paper: Micikevicius et al. 2022 (arXiv:2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Product(Protocol):
    """What `make_linear` makes, see `reference.make_linear`."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor,
        weight_scale: Tensor,
        gradient_scale: Callable[[Tensor], Tensor],
        *,
        new_weight: bool | None = None,
    ) -> Tensor:
        """X [..., i], weight [o, i] -> [..., o] in x's dtype.

        Args:
            x: floating.
            weight: in the dtype of `x`.
            x_scale, weight_scale: float32 scalars.
            gradient_scale: gives the scale of the result's gradient [..., o].
            new_weight: None: the weight is cast in each pass, and nothing of it is kept. True: its 8-bit form is made
                and kept. False: weight and scale are those of the last call with True, and so is the form.
        """
        ...


@runtime_checkable
class SplitProduct(Product, Protocol):
    """One that can leave the gradient of the weight for later."""

    def weight_gradient(self, x: Tensor, gradient: Tensor, x_scale: Tensor, gradient_scale: Tensor) -> Tensor:
        """X [..., i] and the gradient [..., o] of the result -> that of the weight [o, i], as of backward."""
        ...


@dataclass(frozen=True)
class Format:
    """A format of 8 bits, and the largest number that a device has of it."""

    dtype: torch.dtype
    largest: float


@dataclass(frozen=True, kw_only=True)
class Formats:
    """What a linear layer computes with.

    Attributes:
        forward: of its input and weight.
        gradient: of the gradient of its output.
        weight_gradient: whether the product that gives the gradient of the weight is one of 8-bit numbers, too.
    """

    forward: Format
    gradient: Format
    weight_gradient: bool = True


_FORMATS: Mapping[str, tuple[torch.dtype, torch.dtype]] = MappingProxyType(
    {
        "e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fn),
        "e5m2": (torch.float8_e5m2, torch.float8_e5m2),
        "hybrid": (torch.float8_e4m3fn, torch.float8_e5m2),
    }
)


def formats(name: str, largest: Mapping[torch.dtype, float], *, weight_gradient: bool) -> Formats:
    """The formats of `--fp8-format`.

    Args:
        name: e4m3, e5m2 or hybrid: E4M3 for inputs and weights, E5M2 for gradients.
        largest: by format, the largest number that the device has of it.
        weight_gradient: see `Formats`.
    """
    forward, gradient = (Format(dtype, largest[dtype]) for dtype in _FORMATS[name])
    return Formats(forward=forward, gradient=gradient, weight_gradient=weight_gradient)


def scale_of(amax: Tensor, largest: float, margin: int) -> Tensor:
    """The powers of two that bring `amax` just below `largest`, divided by 2 ** `margin`.

    Args:
        amax: largest absolute values, float32 of any shape.
        largest: of the format.
        margin: room for growth, in powers of two.

    Returns:
        Scales shaped like `amax`, float32; 1 where it is 0.
    """
    powers = torch.exp2(torch.floor(torch.log2(largest / amax)) - margin)
    return torch.where(amax > 0.0, powers, torch.ones_like(amax))


def cast(x: Tensor, scale: Tensor, to: Format) -> Tensor:
    """`x` times `scale`, rounded to nearest, ties to even; NaN stays NaN.

    Args:
        x: [...] floating.
        scale: scalar.
        to: the format.

    Returns:
        [...] in the format.
    """
    return (x.float() * scale).clamp_(-to.largest, to.largest).to(to.dtype)


def multiply(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the product of 8-bit a [m, k] and the transpose of b [n, k] stands for: [m, n] in `dtype`; sums are wide."""
    return (_numbers(a, a_scale, dtype) @ _numbers(b, b_scale, dtype).t()).to(dtype)


def _numbers(cast: Tensor, scale: Tensor, like: torch.dtype) -> Tensor:
    """What 8-bit numbers stand for, in float32, or in float64 for that."""
    return cast.to(torch.promote_types(like, torch.float32)) / scale
