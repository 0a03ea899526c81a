"""Linear layers and the embedding, each holding one tensor-parallel rank's part of its weight.

Legend: s=sequence, b=micro-batch, h=hidden, i/o=features in and out, v=vocabulary, t=tensor-parallel ranks.
With sequence parallelism hidden states between these layers are [s/t, b, h], otherwise [s, b, h].
Parameters are plain local tensors or DTensors; all maths is on the local part, read through `local`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.mpu import collectives
from megatron.mpu.deferred import DeferredGradients
from megatron.mpu.eight_bit import EightBitLinear
from megatron.mpu.groups import Group
from megatron.mpu.local import local
from megatron.mpu.mappings import copy_to_region, gather_sequence, reduce_from_region, reduce_scatter_sequence
from megatron.ops import Ops, portable


def replicated(parameter: Tensor, group: Group, *, partial_grad: bool) -> Tensor:
    """A parameter that every rank of the group holds in full.

    Args:
        parameter: the parameter, of any shape.
        group: the tensor-parallel ranks.
        partial_grad: True where each rank uses it for a part of the tokens or heads only. Its gradient is then summed
            over the group in backward, so that every engine finds the whole gradient without a hook.
    """
    value = local(parameter)
    return copy_to_region(value, group) if partial_grad else value


class _ColumnParallel(torch.autograd.Function):
    """Several linear maps of one input, whose gradient collectives run while weight gradients are computed.

    With sequence parallelism the gathered input is not kept for backward but gathered again (arXiv:2205.05198, 4.2.2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sequence_parallel: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        ctx.save_for_backward(x, *weights)
        total = collectives.all_gather(x, group) if sequence_parallel else x
        return tuple(F.linear(total, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        need_input, _, _, *need_weights = ctx.needs_input_grad
        gathering = _start_gather(x, ctx) if any(need_weights) else None
        reducing = None
        if need_input:
            grad_input = torch.matmul(grads[0], weights[0])
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_input = grad_input + torch.matmul(grad, weight)
            start = collectives.start_reduce_scatter if ctx.sequence_parallel else collectives.start_all_reduce_
            reducing = start(grad_input, ctx.group)
        grad_weights: list[Tensor | None] = [None] * len(weights)
        if gathering is not None:
            rows = gathering.wait().flatten(0, -2)
            for at, (grad, needed) in enumerate(zip(grads, need_weights, strict=True)):
                if needed:
                    grad_weights[at] = grad.flatten(0, -2).t().matmul(rows)
        return (reducing.wait() if reducing else None, None, None, *grad_weights)


def _start_gather(x: Tensor, ctx: Any) -> collectives.Pending:
    return collectives.start_all_gather(x, ctx.group) if ctx.sequence_parallel else collectives.Pending(x)


def column_parallel(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    group: Group,
    sequence_parallel: bool,
) -> tuple[Tensor, ...]:
    """Linear maps of one input, their outputs split over the group; the input is gathered once for all of them.

    Args:
        x: [s, b, i], the same on all ranks; [s/t, b, i] with sequence parallelism.
        weights: this rank's rows of each weight, [o/t, i], in the dtype of x.
        biases: this rank's part of each bias [o/t], or None.
        group: the tensor-parallel ranks.
        sequence_parallel: x is split along the sequence.

    Returns:
        One [s, b, o/t] per weight.
    """
    if group.size == 1:
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    outputs = _ColumnParallel.apply(x, group, sequence_parallel, *weights)
    return tuple(y if bias is None else y + bias for y, bias in zip(outputs, biases, strict=True))


class SplitLayer(nn.Module):
    """A layer of which each tensor-parallel rank holds a part.

    Attributes:
        weight: this rank's part.
        group: the tensor-parallel ranks.
        sequence_parallel: hidden states outside are split along the sequence.
        copies: the ranks that hold the same part; None = this rank alone.
        deferred: takes over the gradient of the weight; None = it is computed in backward.
        eight_bit: does the matrix products of training; None = they are of numbers like the input's.
    """

    weight: nn.Parameter
    group: Group
    sequence_parallel: bool
    copies: Group | None = None
    deferred: DeferredGradients | None
    eight_bit: EightBitLinear | None = None

    def own(self, parameter: Tensor) -> Tensor:
        """The local part of the weight or bias. Copies of it see parts of its gradient, which are summed."""
        return local(parameter) if self.copies is None else copy_to_region(local(parameter), self.copies)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """X [..., i], weight [o, i] -> x weight^T [..., o]; in training by 8-bit numbers if the layer does so."""
        return F.linear(x, weight) if self.eight_bit is None or not self.training else self.eight_bit(x, weight)

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Input [..., i] and gradient of the output [..., o] of training -> that of the weight [o, i]."""
        if self.eight_bit is not None:
            return self.eight_bit.weight_gradient(x, gradient)
        return gradient.flatten(0, -2).t().matmul(x.flatten(0, -2))


class ColumnParallelLinear(SplitLayer):
    """Linear layer whose output features are split over the tensor-parallel ranks.

    Args:
        in_features: i, logical.
        out_features: o, logical; must be divisible by the group's size.
        bias: whether there is a bias.
        group: the tensor-parallel ranks.
        sequence_parallel: the input is [s/t, b, i] instead of [s, b, i].
        copies: the ranks among `group` that hold the same rows as this one, of which there are then group / copies
            different parts; None = the rows of every rank are its own.
        deferred: takes over the gradient of the weight; None = it is computed in backward.
        dtype, device: of the parameters, uninitialised.

    Raises:
        ValueError: if the output features cannot be divided.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: Group,
        sequence_parallel: bool = False,
        copies: Group | None = None,
        deferred: DeferredGradients | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.group, self.sequence_parallel, self.deferred = group, sequence_parallel, deferred
        self.copies = copies
        rows = divide(out_features, group.size // (copies.size if copies else 1), "output features")
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, i] (or [s/t, b, i]) -> [s, b, o/t]."""
        return column_linears(x, (self,))[0]


def column_linears(
    x: Tensor, layers: Sequence[ColumnParallelLinear | VocabParallelEmbedding], *, skip_bias: bool = False
) -> tuple[Tensor, ...]:
    """Apply several column-parallel layers to one input, gathering it once; see `column_parallel`.

    Args:
        x: [s, b, i] or [s/t, b, i].
        layers: layers of one group, alike in `sequence_parallel`; or an embedding, used as the head of the model.
        skip_bias: leave the biases out, for a caller that adds them in a fused operation.
    """
    first = layers[0]
    biases = [None if skip_bias or layer.bias is None else layer.own(layer.bias) for layer in layers]
    weights = [_weight(layer) for layer in layers]
    if first.training and first.eight_bit is not None:
        outputs = _eight_bit_columns(x, layers, weights, biases)
    else:
        outputs = column_parallel(x, weights, biases, group=first.group, sequence_parallel=first.sequence_parallel)
    return _watched(outputs, x, layers, first.group if first.sequence_parallel else None)


def _eight_bit_columns(
    x: Tensor, layers: Sequence[SplitLayer], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """What `column_parallel` gives, by products of 8-bit numbers."""
    total = whole_input(x, layers[0])
    products = [layer.product(total, weight) for layer, weight in zip(layers, weights, strict=True)]
    return tuple(y if bias is None else y + bias for y, bias in zip(products, biases, strict=True))


def whole_input(x: Tensor, layer: SplitLayer) -> Tensor:
    """The input of a column-parallel layer for a product elsewhere: [s, b, i] or [s/t, b, i] -> [s, b, i].

    Each rank finds a part of its gradient there; they are summed.
    """
    if layer.sequence_parallel:
        return gather_sequence(x, layer.group, partial_grad=True)
    return copy_to_region(x, layer.group)


def _weight(layer: SplitLayer) -> Tensor:
    """The weight, without gradient if that is deferred."""
    return layer.own(layer.weight) if layer.deferred is None else local(layer.weight).detach()


def _watched(
    outputs: tuple[Tensor, ...],
    x: Tensor,
    layers: Sequence[SplitLayer],
    gather: Group | None,
) -> tuple[Tensor, ...]:
    """The outputs of layers; in backward the gradients of deferred weights are noted down."""
    deferred = layers[0].deferred
    if deferred is None or not torch.is_grad_enabled():
        return outputs
    return deferred.watch(outputs, x, layers, gather)


class _RowParallel(torch.autograd.Function):
    """The sum of the ranks' products. The gradient of the sum is that of each product: nothing is sent in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group, matmul_all_reduce: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_all_reduce(x, weight, group.handle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_input, need_weight, *_ = ctx.needs_input_grad
        grad_input = torch.matmul(grad, weight) if need_input else None
        grad_weight = grad.flatten(0, -2).t().matmul(x.flatten(0, -2)) if need_weight else None
        return grad_input, grad_weight, None, None


class RowParallelLinear(SplitLayer):
    """Linear layer whose input features are split over the tensor-parallel ranks; the partial outputs are summed.

    Args:
        in_features: i, logical; must be divisible by the group's size.
        out_features: o, logical.
        bias: whether there is a bias; it is replicated.
        ops: the kernels.
        group: the tensor-parallel ranks.
        sequence_parallel: the output is [s/t, b, o] instead of [s, b, o].
        deferred: takes over the gradient of the weight; None = it is computed in backward.
        dtype, device: of the parameters, uninitialised.

    Raises:
        ValueError: if the input features cannot be divided.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        ops: Ops,
        group: Group,
        sequence_parallel: bool = False,
        deferred: DeferredGradients | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.group, self.sequence_parallel, self.deferred, self._ops = group, sequence_parallel, deferred, ops
        columns = divide(in_features, group.size, "input features")
        self.weight = nn.Parameter(torch.empty(out_features, columns, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, i/t] -> ([s, b, o] or [s/t, b, o], bias [o] still to be added, or None).

        The bias is left to the caller, who adds it together with dropout and the residual.
        """
        (output,) = _watched((self._sum(x, _weight(self)),), x, (self,), None)
        if self.sequence_parallel:
            output = reduce_scatter_sequence(output, self.group)
        bias = None
        if self.bias is not None:
            bias = replicated(self.bias, self.group, partial_grad=self.sequence_parallel)
        return output, bias

    def _sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum of the ranks' products [s, b, o]; with sequence parallelism this rank's product alone."""
        if self.sequence_parallel or self.group.size == 1:
            return self.product(x, weight)
        two_steps = self._ops.matmul_all_reduce is portable.matmul_all_reduce.function
        if two_steps or (self.training and self.eight_bit is not None):
            # Apart, so that recomputation ends before the sum, of which backward needs nothing.
            return reduce_from_region(self.product(x, weight), self.group)
        return _RowParallel.apply(x, weight, self.group, self._ops.matmul_all_reduce)


class VocabParallelEmbedding(SplitLayer):
    """Token embedding whose rows (the vocabulary) are split over the tensor-parallel ranks.

    Args:
        vocab_rows: v, logical rows including padding; must be divisible by the group's size.
        hidden_size: h.
        ops: the kernels.
        group: the tensor-parallel ranks.
        sequence_parallel: the output is [s/t, b, h] instead of [s, b, h].
        deferred: takes over the gradient of the weight where it is used as a head, see `column_linears`.
        dtype, device: of the parameter, uninitialised.

    Raises:
        ValueError: if the rows cannot be divided.
    """

    def __init__(
        self,
        vocab_rows: int,
        hidden_size: int,
        *,
        ops: Ops,
        group: Group,
        sequence_parallel: bool = False,
        deferred: DeferredGradients | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.group, self.sequence_parallel, self.deferred, self._ops = group, sequence_parallel, deferred, ops
        self.bias = None
        rows = divide(vocab_rows, group.size, "vocabulary rows")
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] (int64) -> [s, b, h] or [s/t, b, h]."""
        weight = local(self.weight)
        ids = tokens.transpose(0, 1).contiguous()
        if self.group.size == 1:
            return self._ops.embedding(weight, ids)
        own = ids - self.group.rank * weight.shape[0]
        elsewhere = (own < 0) | (own >= weight.shape[0])
        rows = self._ops.embedding(weight, own.masked_fill(elsewhere, 0))
        partial = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        reduce = reduce_scatter_sequence if self.sequence_parallel else reduce_from_region
        return reduce(partial, self.group)


def divide(length: int, parts: int, what: str) -> int:
    """`length` / `parts`.

    Raises:
        ValueError: if it is not a whole number.
    """
    if length % parts:
        raise ValueError(
            f"{what}: {length} cannot be divided over {parts} tensor-parallel ranks; "
            f"--tensor-model-parallel-size must divide {length}"
        )
    return length // parts
