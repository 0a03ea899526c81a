"""The order in which tokens go to experts, and back.

Legend: N=tokens, k=experts of a token, E=experts, h=hidden, m=rows that go to experts. A choice is a token with one of
its experts: number t*k+j for choice j of token t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Dispatch:
    """Which choices go to experts, sorted by expert.

    Attributes:
        rows: choices [m] int64; N*k where a row only fills up.
        places: row of each choice [N*k] int64; m for choices that are dropped.
        counts: rows of each expert, int64 [E].
        complete: no choice is dropped and no row only fills up.
    """

    rows: Tensor
    places: Tensor
    counts: Tensor
    complete: bool

    def gather(self, x: Tensor, topk: int) -> Tensor:
        """Tokens [N, h] -> the rows that go to experts [m, h]."""
        # Rows that only fill up take any token: nobody looks at their results.
        return x.index_select(0, (self.rows // topk).clamp(max=x.shape[0] - 1))

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Results of experts [m, h], and the weights of the choices [N, k] -> weighted sums [N, h]."""
        found = rows if self.complete else F.pad(rows, (0, 0, 0, 1))
        results = found.index_select(0, self.places).view(*weights.shape, -1)
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), results).squeeze(1)


def count_choices(experts: Tensor, count: int) -> Tensor:
    """How many choices each expert gets: [N, k] int64 -> int64 [E]."""
    return torch.bincount(experts.flatten(), minlength=count)


def dispatch_all(experts: Tensor, counts: Tensor) -> Dispatch:
    """Every choice goes to its expert.

    Args:
        experts: [N, k] int64.
        counts: of `count_choices`.
    """
    rows = torch.sort(experts.flatten(), stable=True).indices
    return Dispatch(rows, _places(rows, rows.numel()), counts, complete=True)


def dispatch_limited(
    experts: Tensor,
    counts: Tensor,
    weights: Tensor,
    *,
    limit: int,
    policy: Literal["probs", "position"],
    pad: bool,
) -> Dispatch:
    """At most `limit` choices go to an expert.

    Args:
        experts: [N, k] int64.
        counts: of `count_choices`.
        weights: [N, k], of the choices.
        limit: choices that an expert takes.
        policy: an expert keeps the choices with the largest weights, or the first ones.
        pad: every expert gets `limit` rows, so that shapes do not depend on the choices.
    """
    chosen, total = experts.flatten(), experts.numel()
    order = torch.arange(total, device=chosen.device)
    if policy == "probs":
        order = torch.sort(weights.detach().flatten(), descending=True, stable=True).indices
    order = order[torch.sort(chosen[order], stable=True).indices]
    owners = chosen[order]
    position = torch.arange(total, device=chosen.device) - (counts.cumsum(0) - counts)[owners]
    kept = position < limit
    if pad:
        slots = counts.numel() * limit
        rows = order.new_full((slots + 1,), total)
        rows.scatter_(0, torch.where(kept, owners * limit + position, slots), order)
        rows = rows[:-1]
        return Dispatch(rows, _places(rows, total), torch.full_like(counts, limit), complete=False)
    rows = order[kept]
    return Dispatch(rows, _places(rows, total), counts.clamp(max=limit), complete=False)


def _places(rows: Tensor, total: int) -> Tensor:
    """Where each choice is among the rows; behind them where it is not."""
    places = rows.new_full((total + 1,), rows.numel())
    places.scatter_(0, rows, torch.arange(rows.numel(), device=rows.device))
    return places[:-1]
