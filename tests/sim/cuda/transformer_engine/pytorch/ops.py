"""SIMULATION of transformer_engine.pytorch.ops: the functions of a linear layer in 8 bits, on one rank."""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine_torch as tex
from torch import Tensor

from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.tensor import Float8Quantizer, Float8TensorStorage


def _product(a: Any, b: Any, layout: str, dtype: torch.dtype, *, grad: bool, split: bool) -> Tensor:
    workspace = torch.empty(0, dtype=torch.uint8)
    a_transposed, b_transposed = (letter == "T" for letter in layout)
    bias_type, out = TE_DType[torch.bfloat16], TE_DType[dtype]
    plain = (None, None, out, None, bias_type, False, None, grad, workspace, 0, False, split)
    return tex.generic_gemm(a, a_transposed, b, b_transposed, *plain)[0]


def _cast(tensor: Any, quantizer: Float8Quantizer | None, what: str, *, rows: bool | None, columns: bool) -> Any:
    if isinstance(tensor, Float8TensorStorage):
        return tensor
    if quantizer is None:
        raise ValueError(f"Missing quantizer for {what} tensor")
    quantizer.set_usage(rowwise=rows, columnwise=columns)
    return quantizer(tensor)


def _alone(quantized: bool, *unused: Any) -> None:
    if not quantized or any(unused):
        raise NotImplementedError("the simulation computes with quantized numbers, on one rank, into new tensors")


class BasicLinear:
    """Its two functions; the module itself is not simulated."""

    @staticmethod
    def _functional_forward(
        input: Tensor,
        weight: Tensor,
        *,
        alpha: float = 1.0,
        bias: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        beta: float | None = None,
        accumulate_into_out: bool = False,
        tensor_parallel_mode: str | None = None,
        tensor_parallel_group: Any = None,
        sequence_parallel: bool = False,
        with_quantized_compute: bool = False,
        backward_override: str | None = None,
        input_quantizer: Float8Quantizer | None = None,
        weight_quantizer: Float8Quantizer | None = None,
        output_quantizer: Float8Quantizer | None = None,
        input_requires_grad: bool = True,
        weight_requires_grad: bool = True,
    ) -> tuple[Tensor, Any, Any]:
        """The result, and input and weight as backward wants them."""
        _alone(with_quantized_compute, alpha != 1.0, bias, out, beta, accumulate_into_out, tensor_parallel_mode)
        _alone(True, backward_override, output_quantizer)
        x = _cast(input, input_quantizer, "input", rows=True, columns=weight_requires_grad)
        w = _cast(weight, weight_quantizer, "weight", rows=True, columns=input_requires_grad)
        y = _product(w, x, "TN", dtype or weight.dtype, grad=False, split=False)
        if input_requires_grad and w is not weight:
            w.update_usage(rowwise_usage=False, columnwise_usage=True)
        if weight_requires_grad:
            x.update_usage(rowwise_usage=False, columnwise_usage=True)
        return y, x if weight_requires_grad else None, w if input_requires_grad else None

    @staticmethod
    def _functional_backward(
        grad_output: Tensor,
        input: Any,
        weight: Any,
        *,
        grad_input_alpha: float | None = None,
        input_requires_grad: bool = True,
        grad_weight_alpha: float | None = None,
        weight_requires_grad: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        grad_weight: Tensor | None = None,
        grad_weight_beta: float | None = None,
        accumulate_into_grad_weight: bool = False,
        grad_input: Tensor | None = None,
        grad_input_beta: float | None = None,
        accumulate_into_grad_input: bool = False,
        tensor_parallel_mode: str | None = None,
        tensor_parallel_group: Any = None,
        sequence_parallel: bool = False,
        with_quantized_compute: bool = False,
        input_quantizer: Float8Quantizer | None = None,
        weight_quantizer: Float8Quantizer | None = None,
        grad_output_quantizer: Float8Quantizer | None = None,
        grad_input_quantizer: Float8Quantizer | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of input and weight."""
        _alone(with_quantized_compute, grad_input_alpha, grad_weight_alpha, grad_weight, grad_input)
        _alone(True, accumulate_into_grad_weight, accumulate_into_grad_input, tensor_parallel_mode)
        _alone(True, grad_weight_beta, grad_input_beta, grad_input_quantizer)
        if grad_output_quantizer is None or (weight_requires_grad and (input is None or input_quantizer is None)):
            raise ValueError("Missing quantizer or input tensor")
        g = _cast(grad_output, grad_output_quantizer, "grad", rows=input_requires_grad, columns=weight_requires_grad)
        g.update_usage(rowwise_usage=input_requires_grad, columnwise_usage=weight_requires_grad)
        dx = dw = None
        if input_requires_grad:
            w = _cast(weight, weight_quantizer, "weight", rows=None, columns=True)
            w.update_usage(columnwise_usage=True)
            dx = _product(w, g, "NN", dtype or torch.get_default_dtype(), grad=True, split=True)
        if weight_requires_grad:
            x = _cast(input, input_quantizer, "input", rows=False, columns=True)
            x.update_usage(columnwise_usage=True)
            dw = _product(x, g, "NT", dtype or torch.get_default_dtype(), grad=True, split=True)
        return dx, dw
