"""SIMULATION of the engine's quantizers and of their internal tensors, which are no tensors to torch."""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine_torch as tex
from torch import Tensor


class Float8TensorStorage:
    """Bytes by rows, by columns, or both, and what to multiply them by."""

    def __init__(
        self,
        *,
        data: Tensor | None,
        fp8_scale_inv: Tensor,
        fp8_dtype: tex.DType,
        fake_dtype: torch.dtype | None = None,
        data_transpose: Tensor | None = None,
        quantizer: Any = None,
    ) -> None:
        self._data, self._transpose, self._scale_inv = data, data_transpose, fp8_scale_inv
        self._fp8_dtype, self._dtype, self._quantizer = fp8_dtype, fake_dtype, quantizer

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Make or drop forms; that by rows cannot be made."""
        if tex.Arch.blackwell:
            return
        if columnwise_usage and self._transpose is None:
            if self._data is None:
                raise RuntimeError("FP8 data is required to generate FP8 data transpose")
            self._transpose = tex.fp8_transpose(self._data, self._fp8_dtype, out=None)
        if rowwise_usage and self._data is None:
            raise RuntimeError("Cannot generate FP8 data, even from FP8 data transpose")
        if rowwise_usage is False:
            self._data = None
        if columnwise_usage is False:
            self._transpose = None

    def prepare_for_saving(self) -> tuple[list[Tensor | None], Float8TensorStorage]:
        """Its plain tensors, and itself without them."""
        tensors = [self._data, self._transpose, self._scale_inv]
        self._data = self._transpose = self._scale_inv = None
        return tensors, self

    def restore_from_saved(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """Take the first tensors back; returns the others."""
        self._data, self._transpose, self._scale_inv = tensors[:3]
        return tensors[3:]


class Float8Quantizer:
    """Casts with a scale that it is given."""

    def __init__(
        self, scale: Tensor, amax: Tensor, fp8_dtype: tex.DType, *, rowwise: bool = True, columnwise: bool = True
    ) -> None:
        self.scale, self.amax, self.dtype = scale, amax, tex.DType(fp8_dtype)
        self.rowwise_usage, self.columnwise_usage, self.internal = rowwise, columnwise, False

    def set_usage(self, *, rowwise: bool | None = None, columnwise: bool | None = None) -> None:
        """Which forms to make."""
        self.rowwise_usage = self.rowwise_usage if rowwise is None else rowwise
        self.columnwise_usage = self.columnwise_usage if columnwise is None else columnwise

    def __call__(self, tensor: Tensor) -> Float8TensorStorage:
        """The 8-bit form."""
        return tex.quantize(tensor, self)


def prepare_for_saving(*tensors: Any) -> tuple[list[Tensor | None], list[Float8TensorStorage | None]]:
    """Plain tensors, and what they belong to."""
    plain: list[Tensor | None] = []
    objects: list[Float8TensorStorage | None] = []
    for tensor in tensors:
        own, thing = ([tensor], None) if tensor is None or isinstance(tensor, Tensor) else tensor.prepare_for_saving()
        plain += own
        objects.append(thing)
    return plain, objects


def restore_from_saved(tensors: list[Any], saved_tensors: Any, return_saved_tensors: bool = False) -> list[Any]:
    """What was given to `prepare_for_saving`."""
    if return_saved_tensors:
        raise NotImplementedError("not simulated")
    restored, rest = [], list(saved_tensors)
    for tensor in tensors:
        if tensor is None:
            restored.append(rest.pop(0))
        else:
            rest = tensor.restore_from_saved(rest)
            restored.append(tensor)
    return restored
