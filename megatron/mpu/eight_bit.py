"""Scales of linear layers that compute with 8-bit numbers, and how they follow from the values seen.

Delayed scaling: during a step the largest absolute values of every layer's input, weight and output gradient are noted;
after it they are made the same on all ranks that share the layer, put into a history, and give the scales of the steps
that follow. So a scale belongs to a layer and a step: it does not depend on the number of micro-batches, their order in
a pipeline, or which rank has them, and what is recomputed is computed with the same scales. Current scaling
(`delayed` off, and in steps before anything was noted) takes the largest value of the tensor itself.

The history lies on the host, under the logical names of the layers, and is part of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron.mpu import collectives
from megatron.mpu.groups import ProcessGroups
from megatron.ops.float8 import Formats, Product, SplitProduct, scale_of

_INPUT, _WEIGHT, _GRADIENT = range(3)


@dataclass(frozen=True, kw_only=True)
class ScalingRecipe:
    """How scales follow from values.

    Attributes:
        delayed: from those of earlier steps instead of those of the tensor itself.
        margin: powers of two that scales are made smaller by.
        interval: steps from one measurement to the next.
        history: measurements that are kept.
        algorithm: the scale follows from the largest of them, or from the last.
        reduce: values are those of all ranks that share the layer.
        keep_weights: the 8-bit form of a weight is made once per step and kept, not made in each pass.
    """

    delayed: bool = True
    margin: int = 0
    interval: int = 1
    history: int = 1
    algorithm: Literal["most_recent", "max"] = "most_recent"
    reduce: bool = True
    keep_weights: bool = False


class EightBitScaling:
    """The scales of the 8-bit layers of one rank.

    Args:
        recipe: how scales follow from values.
        formats: of the numbers.
        groups: this process's groups.
        device: of the layers.
    """

    def __init__(self, recipe: ScalingRecipe, formats: Formats, groups: ProcessGroups, device: torch.device) -> None:
        self.formats = formats
        self._recipe, self._groups, self._device = recipe, groups, device
        self._largest = (formats.forward.largest, formats.forward.largest, formats.gradient.largest)
        self._names: list[str] = []
        self._steps = torch.zeros((), dtype=torch.int64)
        self._known = False
        self.epoch = 0
        """Changes whenever weights or scales do."""
        self._make_room()

    @property
    def keeps_weights(self) -> bool:
        """Whether the 8-bit form of a weight is kept while `epoch` stays."""
        return self._recipe.keep_weights

    def add(self, name: str) -> int:
        """Make room for the scales of a layer of this logical name; returns its number. Before the first step."""
        self._names.append(name)
        self._make_room()
        return len(self._names) - 1

    def _make_room(self) -> None:
        count = len(self._names)
        self._history = torch.zeros(count, self._recipe.history, 3)
        self._seen = torch.zeros(count, 3, device=self._device)
        self._scales = torch.ones(count, 3, device=self._device)

    def scale(self, layer: int, which: int, tensor: Tensor) -> Tensor:
        """The scale for a tensor of a layer in this step, float32 scalar; the tensor is measured if it is time.

        Args:
            layer: its number.
            which: 0 input, 1 weight, 2 gradient of the output.
            tensor: of any shape.
        """
        measuring = self._recipe.delayed and int(self._steps) % self._recipe.interval == 0
        if self._known and not measuring:
            return self._scales[layer, which]
        amax = tensor.detach().abs().amax().float()
        if measuring:
            seen = self._seen[layer, which]
            seen.copy_(torch.maximum(seen, amax))
        if self._known:
            return self._scales[layer, which]
        if self._recipe.reduce:
            amax = collectives.all_reduce(amax.reshape(1), self._groups.tp, collectives.MAX)[0]
        return scale_of(amax, self._largest[which], self._recipe.margin)

    def after_step(self) -> None:
        """Take what was seen in this step into the history. Called by all ranks, after the backward computations."""
        self.epoch += 1
        if not self._recipe.delayed:
            return
        if int(self._steps) % self._recipe.interval == 0:
            # How NaN compares is up to the collective library.
            seen = torch.where(self._seen.isnan(), math.inf, self._seen)
            for group in (self._groups.tp, self._groups.dp_cp) if self._recipe.reduce else ():
                seen = collectives.all_reduce(seen, group, collectives.MAX)
            self._history.copy_(roll(self._history, seen.cpu()))
            self._seen.zero_()
            self.refresh()
        self._steps += 1

    def forget(self) -> None:
        """Begin as a new run does. Whoever fills `tensors` from a checkpoint that may lack them does this first."""
        for tensor in (self._history, self._seen, self._steps):
            tensor.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Make the scales anew, from a history that has changed."""
        self.epoch += 1
        amax = self._history.amax(1) if self._recipe.algorithm == "max" else self._history[:, 0]
        columns = zip(amax.unbind(1), self._largest, strict=True)
        self._scales.copy_(torch.stack([scale_of(values, top, self._recipe.margin) for values, top in columns], dim=1))
        self._known = self._recipe.delayed and bool((self._history > 0.0).any())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the history of each layer [history, 3] float32 and the number of steps int64.

        They are the same on all ranks that share a layer; where they are not (no `reduce`), nothing is kept and the
        first step after a load measures anew. Whoever fills them calls `refresh`.
        """
        if not (self._recipe.delayed and self._recipe.reduce):
            return {}
        histories = zip(self._names, self._history, strict=True)
        return {"fp8.steps": self._steps} | {f"fp8.{name}.amax": history for name, history in histories}


def roll(history: Tensor, seen: Tensor) -> Tensor:
    """The history after a measurement, newest first.

    Args:
        history: [layers, length, 3] float32.
        seen: [layers, 3]; nothing (0) and what is not finite repeat the measurement before.

    Returns:
        [layers, length, 3].
    """
    newest = torch.where((seen > 0.0) & seen.isfinite(), seen, history[:, 0])
    return torch.cat((newest[:, None], history[:, :-1]), dim=1)


class EightBitLinear:
    """The matrix products of one layer.

    Args:
        product: what `ops.make_linear` made.
        scaling: the scales of the rank.
        layer: the number of the layer among them.
    """

    def __init__(self, product: Product, scaling: EightBitScaling, layer: int) -> None:
        self._product, self._scaling, self._layer = product, scaling, layer
        self._kept: tuple[int, Tensor] | None = None

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """X [..., i], weight [o, i] -> [..., o] in x's dtype."""
        scale, new = self._weight_scale(weight)
        return self._product(x, weight, self._scale(_INPUT)(x), scale, self._scale(_GRADIENT), new_weight=new)

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the weight [o, i] as backward would have given it, in the same step.

        Args:
            x: the input [..., i].
            gradient: of the output [..., o].
        """
        assert isinstance(self._product, SplitProduct)
        return self._product.weight_gradient(x, gradient, self._scale(_INPUT)(x), self._scale(_GRADIENT)(gradient))

    def _weight_scale(self, weight: Tensor) -> tuple[Tensor, bool | None]:
        """The scale of the weight, and what `Product` wants to know of it."""
        if not self._scaling.keeps_weights:
            return self._scale(_WEIGHT)(weight), None
        epoch, new = self._scaling.epoch, False
        if self._kept is None or self._kept[0] != epoch:
            self._kept, new = (epoch, self._scale(_WEIGHT)(weight)), True
        return self._kept[1], new

    def _scale(self, which: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: self._scaling.scale(self._layer, which, tensor)
