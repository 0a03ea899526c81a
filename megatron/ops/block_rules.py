"""Who sees whom where the attention of a sequence is computed in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockRules:
    """The rules of `reference.attention` for a piece of each sequence (queries) and another piece of it (keys).

    Attributes:
        scale: factor on q k^T.
        distance: tokens from the first key to the first query, at least 0. 0 is plain causal attention within one
            piece; from the number of keys less one on, every query sees every key.
        alibi_slopes: [n] float; head i takes slope i times the distance of a key from its scores.
        query_documents: [b, s] integers, together with
        key_documents: [b, t] integers; tokens of different documents do not see each other.
        window: number of most recent positions a query sees, itself included; None for all.
    """

    scale: float
    distance: int
    alibi_slopes: Tensor | None = None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    window: int | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockRules:
        """The same rules with every tensor replaced."""
        changed: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    def keys_in_reach(self, start: int, end: int, keys: int) -> tuple[int, int]:
        """The range of keys that hold all which queries [start, end) see by their position; never empty."""
        stop = min(keys, end + self.distance)
        first = 0 if self.window is None else max(0, start + self.distance - self.window + 1)
        return min(first, stop - 1), stop

    def distances(self, queries: tuple[int, int], keys: tuple[int, int], device: torch.device) -> Tensor:
        """How many tokens each key of a range is before each query of a range: [queries, keys], negative if after."""
        rows = torch.arange(*queries, device=device) + self.distance
        return rows[:, None] - torch.arange(*keys, device=device)

    def hidden(self, queries: tuple[int, int], keys: tuple[int, int], device: torch.device) -> Tensor:
        """True where a query of a range does not see a key of a range: bool [1 or b, queries, keys]."""
        distances = self.distances(queries, keys, device)
        hidden = (distances < 0)[None]
        if self.window is not None:
            hidden = hidden | (distances >= self.window)
        if self.query_documents is not None and self.key_documents is not None:
            rows, columns = self.query_documents[:, slice(*queries)], self.key_documents[:, slice(*keys)]
            hidden = hidden | (rows[:, :, None] != columns[:, None, :])
        return hidden
