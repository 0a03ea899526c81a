"""Gradients of weights, computed after the gradients of inputs: what zero-bubble pipeline schedules are made of.

In backward a linear layer computes the gradient of its input, for which the stage before waits. If it defers the
gradient of its weight, what that needs (its input and the gradient of its output) is kept instead, and the matrix
product is done later, when there is nothing more urgent. Paper: Qi et al. 2023 (arXiv:2401.10241).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.mpu import collectives
from megatron.mpu.groups import Group


class Linear(Protocol):
    """A linear layer whose weight is read through `own`, which knows what becomes of the gradient."""

    weight: nn.Parameter

    def own(self, parameter: Tensor) -> Tensor:
        """The local part of a parameter of this layer."""
        ...

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Input [s, b, i] and gradient of the output [s, b, o] -> that of the weight [o, i]."""
        ...


@dataclass(frozen=True)
class WeightTask:
    """Weight gradients that are still to be computed.

    Attributes:
        layers: linear layers of one input, each with a weight [o, i].
        x: their input [s, b, i], or this rank's part of it, [s/t, b, i].
        gradients: of their outputs [s, b, o].
        gather: the ranks that share the input along the sequence, or None.
    """

    layers: Sequence[Linear]
    x: Tensor
    gradients: tuple[Tensor, ...]
    gather: Group | None

    def as_zero(self) -> Tensor:
        """A scalar zero whose backward computes the weight gradients and adds them to those of the weights."""
        weights = [layer.own(layer.weight) for layer in self.layers]
        return _Zero.apply(self, *weights)


class DeferredGradients:
    """Collects the tasks of one stage."""

    def __init__(self) -> None:
        self._tasks: list[WeightTask] = []

    def watch(
        self, outputs: tuple[Tensor, ...], x: Tensor, layers: Sequence[Linear], gather: Group | None
    ) -> tuple[Tensor, ...]:
        """Collect a task when the backward computation passes here.

        Args:
            outputs: of the layers [s, b, o], computed with detached weights.
            x, layers, gather: see `WeightTask`.

        Returns:
            The outputs.
        """
        return _Watch.apply(self, layers, gather, x.detach(), *outputs)

    def add(self, task: WeightTask) -> None:
        """Collect a task."""
        self._tasks.append(task)

    def take(self) -> list[WeightTask]:
        """The tasks collected so far, which are forgotten here."""
        tasks, self._tasks = self._tasks, []
        return tasks


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        store: DeferredGradients,
        layers: Sequence[Linear],
        gather: Group | None,
        x: Tensor,
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.store, ctx.layers, ctx.gather = store, layers, gather
        ctx.save_for_backward(x)
        if any(output._is_view() for output in outputs):
            return tuple(output.view_as(output) for output in outputs)
        # As if changed in place, so that a model does not return a view of its logits: FSDP warns of that.
        ctx.mark_dirty(*outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        ctx.store.add(WeightTask(ctx.layers, x, gradients, ctx.gather))
        return (None, None, None, None, *gradients)


class _Zero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: WeightTask, *weights: Tensor) -> Tensor:
        ctx.task = task
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        task: WeightTask = ctx.task
        x = task.x if task.gather is None else collectives.all_gather(task.x, task.gather)
        pairs = zip(task.layers, task.gradients, strict=True)
        return (None, *(layer.weight_gradient(x, gradient) for layer, gradient in pairs))
