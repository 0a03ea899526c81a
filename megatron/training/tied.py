"""Tied embeddings in a pipeline: the head of the last stage is a copy of the word embedding of the first stage.

The first stage's embedding is the parameter: it alone has an optimizer state, a place in the gradient norm and one in a
checkpoint. The copy lends it its gradient once a step and takes over its values after the step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron.mpu.collectives import start_receive, start_send
from megatron.mpu.groups import Group
from megatron.mpu.local import local
from megatron.mpu.pipeline import StageLayout

NAME = "embedding.word.weight"
"""Of the parameter and of its copy, in their stages."""


def logical_parameters(stages: Mapping[int, nn.Module], layout: StageLayout) -> dict[str, nn.Parameter]:
    """The parameters of this rank's stages by logical name, without a copy of the word embedding."""
    copied = layout.last > 0
    return {
        name: parameter
        for number, stage in stages.items()
        for name, parameter in stage.named_parameters()
        if not (copied and number == layout.last and name == NAME)
    }


def tied_embedding(stages: Mapping[int, nn.Module], layout: StageLayout, group: Group) -> TiedEmbedding | None:
    """The tie of a model with tied embeddings; None if this rank, or the model in one stage, has no part in it."""
    ends = [stages[number].get_parameter(NAME) if number in stages else None for number in (0, layout.last)]
    if layout.last == 0 or ends == [None, None]:
        return None
    return TiedEmbedding(ends[0], ends[1], group, layout)


class TiedEmbedding:
    """Both ends of the tie, as far as this rank holds them.

    Args:
        parameter: the word embedding of the first stage; None if that is on another rank.
        copy: the head of the last stage; None if that is on another rank.
        group: the pipeline ranks.
        layout: the stages.
    """

    def __init__(
        self, parameter: nn.Parameter | None, copy: nn.Parameter | None, group: Group, layout: StageLayout
    ) -> None:
        self._parameter, self._copy, self._group = parameter, copy, group
        self._first, self._last = layout.rank_of(0), layout.rank_of(layout.last)

    def collect_gradient(self) -> None:
        """Add the copy's gradient to the parameter's, after all micro-batches and their reduction."""
        gradient = None
        if self._copy is not None:
            assert self._copy.grad is not None
            gradient, self._copy.grad = local(self._copy.grad), None
        gradient = self._pass(gradient, None if self._parameter is None else self._grad(), self._last, self._first)
        if self._parameter is not None:
            assert gradient is not None
            self._grad().add_(gradient)

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the copy the values of the parameter, which has been initialised, loaded or updated."""
        target = None if self._copy is None else local(self._copy)
        value = self._pass(None if self._parameter is None else local(self._parameter), target, self._first, self._last)
        if target is not None:
            assert value is not None
            target.copy_(value)

    def _grad(self) -> Tensor:
        assert self._parameter is not None and self._parameter.grad is not None
        return local(self._parameter.grad)

    def _pass(self, value: Tensor | None, like: Tensor | None, sender: int, receiver: int) -> Tensor | None:
        """`value` of one pipeline rank on another one, where it is shaped like `like`; None elsewhere."""
        rank = self._group.rank
        if sender == receiver:
            return value
        if rank == sender and value is not None:
            start_send(value, self._group, receiver).wait()
        if rank == receiver and like is not None:
            return start_receive(torch.empty_like(like), self._group, sender).wait()
        return None
