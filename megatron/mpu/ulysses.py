"""Sequences shared by heads (DeepSpeed-Ulysses, arXiv:2309.14509).

Between the layers every rank has some tokens of each sequence. For attention the ranks exchange: each gets all tokens
of some heads, and gives the result back.

Legend: s=tokens of a rank, u=ranks, b=micro-batch, n=query heads, g=kv heads, d=head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.mpu.groups import Group
from megatron.mpu.mappings import all_to_all


def copies_of_kv_heads(heads: int, ranks: int) -> int:
    """How often each key/value head is repeated so that every rank gets as many, those of its query heads.

    Args:
        heads: g.
        ranks: u, which divides the number of query heads.
    """
    return ranks // math.gcd(heads, ranks)


def scatter_heads(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of this rank's heads.

    Args:
        q: [s, b, n, d]; u divides n.
        k, v: [s, b, g, d]. Heads that several ranks need are sent to each; their gradients are summed.
        group: the ranks; one = the arguments are returned.

    Returns:
        [s u, b, n/u, d] and twice [s u, b, g c/u, d] (c = `copies_of_kv_heads`).
    """
    if group.size == 1:
        return q, k, v
    copies = copies_of_kv_heads(k.shape[2], group.size)
    parts = [x.unflatten(2, (group.size, -1)) for x in (q, *(y.repeat_interleave(copies, dim=2) for y in (k, v)))]
    heads = [x.shape[3] for x in parts]
    received: Tensor = all_to_all(torch.cat(parts, dim=3).movedim(2, 0), group)  # [u, s, b, heads of a rank, d]
    queries, keys, values = received.flatten(0, 1).split(heads, dim=2)
    return queries, keys, values


def gather_heads(x: Tensor, group: Group) -> Tensor:
    """All heads of this rank's tokens: [s u, b, n/u, d] -> [s, b, n, d]; the inverse of `scatter_heads`."""
    if group.size == 1:
        return x
    received: Tensor = all_to_all(x.unflatten(0, (group.size, -1)), group)
    return received.movedim(0, 2).flatten(2, 3)
