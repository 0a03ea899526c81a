"""Keys and values of text that was read before, so that each new token is read alone.

Legend: s=tokens read at once, b=texts, g=kv heads of this rank, d=head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of this rank's layers and heads.

    Slot j of a text holds its token at position j, whatever the lengths of the others. So texts of different lengths
    need no padding on the left and no mask: what stands behind the end of a text is not seen by its tokens, which are
    all before it, and is overwritten when the text grows.

    Args:
        capacity: slots: the longest text that there will be, in tokens.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0
        """Slots in use: tokens of the longest text, those that are being read included. Set by who reads."""

    def begin(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep the beginnings of all texts.

        Args:
            layer: its global number.
            k, v: [s, b, g, d]; shorter texts are filled up on the right, with anything finite.
        """
        self._layers[layer] = (self._kept(k), self._kept(v))

    def _kept(self, x: Tensor) -> Tensor:
        """[s, b, g, d] -> [b, g, capacity, d]. Zeros, because what is not seen still gets multiplied by zero."""
        kept = x.new_zeros(x.shape[1], x.shape[2], self._capacity, x.shape[3])
        kept[:, :, : x.shape[0]] = x.permute(1, 2, 0, 3)
        return kept

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keep further tokens of all texts.

        Args:
            layer: its global number.
            k, v: [s, b, g, d] of the new tokens.
            positions: [b, s] int64 of the new tokens in their texts.

        Returns:
            Keys and values of all tokens, [length, b, g, d].
        """
        texts = torch.arange(positions.shape[0], device=positions.device)[:, None]
        for kept, new in zip(self._layers[layer], (k, v), strict=True):
            kept[texts, :, positions] = new.transpose(0, 1)
        keys, values = (kept[:, :, : self.length].permute(2, 0, 1, 3) for kept in self._layers[layer])
        return keys, values

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts (numbers as they are now): some left out, some several times."""
        self._layers = {layer: (_rows(k, texts), _rows(v, texts)) for layer, (k, v) in self._layers.items()}


def _rows(x: Tensor, numbers: Sequence[int]) -> Tensor:
    return x[torch.tensor(numbers, device=x.device)]
