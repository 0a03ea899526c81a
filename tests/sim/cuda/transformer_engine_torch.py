"""SIMULATION of the compiled part of Transformer Engine 2: casts to 8 bits and their products, on host tensors.

Signatures are those of the engine's Python bindings; what its kernels refuse is refused, and what they read without
looking at it (the memory of a scale) is looked at. Maths is float32. `Arch.blackwell` says which generation it is.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor


class DType(enum.IntEnum):
    """Numbers of the engine's dtypes."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class Arch:
    """The simulated card. Before Blackwell products need the form by columns, which a cast makes with that by rows."""

    blackwell = False


CALLS: list[str] = []
"""Names of the functions that were called."""

_EIGHT_BITS = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}
_RESULTS = {DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16}


def _require(truth: bool, message: str) -> None:
    if not truth:
        raise RuntimeError(message)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` times the quantizer's scale in 8 bits; leaves the largest value in the quantizer."""
    from transformer_engine.pytorch import Float8TensorStorage

    CALLS.append("quantize")
    _require(output is None and noop is None and quantizer.internal, "the simulation makes new internal tensors only")
    for name, one in (("scale", quantizer.scale), ("amax", quantizer.amax)):
        fits = one.dtype == torch.float32 and one.shape == (1,) and one.device == tensor.device
        _require(fits, f"{name} must be a float32 tensor [1] beside the input, not {one.dtype} {list(one.shape)}")
    _require(tensor.dtype in _RESULTS.values() and tensor.dim() >= 2, f"input {tensor.dtype} {list(tensor.shape)}")
    by_rows = quantizer.rowwise_usage or Arch.blackwell
    by_columns = quantizer.columnwise_usage and not Arch.blackwell
    _require(by_rows or not by_columns, "Quantizing in only the columnwise direction not supported yet!")
    to = _EIGHT_BITS[DType(quantizer.dtype)]
    largest = torch.finfo(to).max
    x8 = (tensor.float() * quantizer.scale).clamp(-largest, largest).to(to).view(torch.uint8)
    quantizer.amax.copy_(tensor.abs().amax())
    return Float8TensorStorage(
        data=x8.contiguous(),
        fp8_scale_inv=quantizer.scale.reciprocal(),
        fp8_dtype=quantizer.dtype,
        data_transpose=x8.flatten(0, -2).t().contiguous() if by_columns else None,
        quantizer=quantizer,
        fake_dtype=tensor.dtype,
    )


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: DType | None,
    bias: Tensor | None,
    bias_type: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, None, None, None]:
    """B A with either transposed, as matrices by rows."""
    CALLS.append("generic_gemm")
    plain = (D, quantizer, bias, gelu_in, comm_overlap, comm_type, extra_output)
    _require(all(value is None for value in plain) and not (gelu or accumulate or bulk_overlap), "not simulated")
    _require(alpha == 1.0 and not beta and output_dtype is not None, "not simulated")
    formats = {DType(A._fp8_dtype), DType(B._fp8_dtype)}
    _require(formats != {DType.kFloat8E5M2}, "cuBLASLt has no product of E5M2 numbers alone")
    a = _operand("A", A, by_rows=transA)
    b = _operand("B", B, by_rows=not transB)
    _require(a.shape[1] == b.shape[1], f"Invalid matrix dimensions for GEMM: {list(a.shape)}, {list(b.shape)}")
    return (b @ a.t()).to(_RESULTS[DType(output_dtype)]), None, None, None


def _operand(name: str, x: Any, *, by_rows: bool) -> Tensor:
    """The numbers that an operand stands for, with the dimension that is summed over last."""
    if Arch.blackwell:
        _require(x._data is not None, f"Input {name} is missing row-wise usage")
        numbers = x._data if by_rows else x._data.t()
        leading = x._data.shape[-1]
    else:
        numbers = x._data if by_rows else x._transpose
        _require(numbers is not None, f"Input {name} is missing {'row' if by_rows else 'column'}-wise usage")
        leading = numbers.shape[-1]
    _require(leading % 16 == 0, f"Leading dimension requirement on {name} for FP8 GEMM. Caller must pad.")
    return numbers.view(_EIGHT_BITS[DType(x._fp8_dtype)]).float() * x._scale_inv


def fp8_transpose(input: Tensor, dtype: DType, *, out: Tensor | None) -> Tensor:
    """Bytes [m, n] -> [n, m]."""
    CALLS.append("fp8_transpose")
    _require(out is None and input.dtype == torch.uint8, "not simulated")
    return input.t().contiguous()
