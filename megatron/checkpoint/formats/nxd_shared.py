"""A tensor of NeuronX Distributed and the logical ones that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpoint.formats.parts import Split, cut, joined
from megatron.model.hf import Layout

_SAME = Layout(split=lambda x: (x,), join=lambda parts: parts[0])


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A tensor that ranks have shares of.

    Attributes:
        name: what the ranks call it.
        ours: the logical tensors it is made of.
        cut: from those to the share of each of so many ranks.
        join: from the shares of all ranks to the logical tensors.
    """

    name: str
    ours: tuple[str, ...]
    cut: Callable[[tuple[Tensor, ...], int], list[Tensor]]
    join: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


def laid_out(name: str, ours: tuple[str, ...], layout: Layout, split: Split | None) -> Shared:
    """A tensor that is made of logical ones and then cut in equal parts, or that every rank has."""
    return Shared(
        name=name,
        ours=ours,
        cut=lambda parts, ranks: cut(layout.join(parts), split, ranks),
        join=lambda shares: layout.split(joined(shares, split, name, average=False)),
    )


def plain(name: str, ours: str, split: Split | None) -> Shared:
    """A logical tensor that is cut in equal parts, or that every rank has."""
    return laid_out(name, (ours,), _SAME, split)


def stacked(name: str, ours: tuple[str, ...]) -> Shared:
    """Tensors of equal size of which a rank has its part of each, one after the other."""
    layout = Layout(split=lambda x: x.chunk(len(ours)), join=torch.cat)
    return laid_out(name, ours, layout, Split(0, len(ours)))
