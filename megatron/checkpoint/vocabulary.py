"""The rows of the vocabulary that exist.

The embedding is padded to a multiple of --make-vocab-size-divisible-by times the number of tensor-parallel ranks, so
the number of its rows depends on the layout. A checkpoint holds the real rows alone.
"""

from __future__ import annotations

import torch

_VOCABULARY_PARAMETERS = ("embedding.word.weight", "head.weight")


def has_vocabulary_rows(name: str, shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether the first axis of a tensor counts tokens: the embedding, the head and their optimizer state.

    Args:
        name: as in a checkpoint, for example "optimizer.exp_avg.head.weight".
        shape: its logical shape; a scalar of the optimizer (its step) has no rows.
    """
    return len(shape) > 0 and any(name == p or name.endswith(f".{p}") for p in _VOCABULARY_PARAMETERS)
