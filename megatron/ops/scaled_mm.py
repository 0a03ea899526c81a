"""Linear layers of 8-bit numbers through `torch._scaled_mm`, which torch has had with this signature since 2.5.

Its kernels take the first matrix by rows and the second by columns, 16 bytes at a time, at least one of E4M3; scales
are float32 scalars that the product is multiplied by. torch checks some of that on some devices; it runs on CPUs, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.eight_bit_linear import EightBitProduct
from megatron.ops.float8 import Formats

ROWS = 16
"""What the rows of an input are a multiple of."""


def make(in_features: int, out_features: int, formats: Formats) -> EightBitProduct:
    """See `reference.make_linear`.

    Raises:
        ValueError: a product would be of E5M2 numbers alone.
    """
    check_formats(formats)
    return EightBitProduct(in_features, out_features, formats, _multiply, rows=ROWS)


def check_formats(formats: Formats) -> None:
    """Some matrix units need E4M3 on one side.

    Raises:
        ValueError: a product would be of E5M2 numbers alone.
    """
    if formats.forward.dtype == torch.float8_e5m2:
        raise ValueError("--fp8-format e5m2: this device multiplies E5M2 with E4M3 only; use hybrid or e4m3")


def _multiply(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of what 8-bit a [m, k] and the transpose of b [n, k] stand for: [m, n] in `dtype`."""
    scales = a_scale.reciprocal(), b_scale.reciprocal()
    result: Tensor = torch._scaled_mm(a.contiguous(), b.contiguous().t(), *scales, out_dtype=dtype)
    return result
