"""Whether a state can be trusted: finite everywhere, and the same to the last bit wherever several ranks hold it.

Tensor-parallel and data-parallel ranks hold copies of the same parameters and compute the same updates to them. Where
a faulty device or a missing reduction makes one of them drift, training goes on and gets worse without a sign.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpoint.parts import Stored
from megatron.checkpoint.pieces import Offsets, pieces
from megatron.checkpoint.ranks import Ranks

_DIGEST_BYTES = 16
_SHOWN = 8


@dataclass(frozen=True)
class Drift:
    """A block of a tensor that ranks hold with different values.

    Attributes:
        name: of the tensor.
        offsets: where the block begins in it.
        camps: ranks with the same value, the largest camp first; of equal ones that of the lowest rank.
    """

    name: str
    offsets: Offsets
    camps: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        camps = " | ".join(", ".join(map(str, camp)) for camp in self.camps)
        return f"{self.name} from {list(self.offsets)}: ranks that should hold the same values differ: {camps}"


def not_finite(tensors: Mapping[str, Stored]) -> list[str]:
    """One sentence for each tensor of which this rank holds NaN or infinite values."""
    found = []
    for name, value in tensors.items():
        blocks = [block for _, block in pieces(value) if block.is_floating_point()]
        bad = sum(int((~torch.isfinite(_readable(block))).sum()) for block in blocks)
        if bad:
            found.append(f"{name}: {bad} values are NaN or infinite")
    return found


def _readable(block: Tensor) -> Tensor:
    """8-bit floats know no isfinite."""
    return block.float() if block.itemsize == 1 else block


def drifts(tensors: Mapping[str, Stored], ranks: Ranks) -> list[Drift]:
    """The blocks that ranks disagree on. Called by all ranks; each copies what it holds, one by one."""
    own = {
        (name, offsets, tuple(block.shape)): _digest(block)
        for name, value in tensors.items()
        for offsets, block in pieces(value)
    }
    holders: dict[tuple[str, Offsets, tuple[int, ...]], dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, digests in enumerate(ranks.each(lambda: own)):
        for key, digest in digests.items():
            holders[key][digest].append(rank)
    return [Drift(key[0], key[1], _camps(by.values())) for key, by in holders.items() if len(by) > 1]


def _camps(groups: Iterable[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(sorted(map(tuple, groups), key=lambda camp: (-len(camp), camp)))


def _digest(block: Tensor) -> bytes:
    data = block.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def heal(tensors: Mapping[str, Stored], found: Iterable[Drift], ranks: Ranks) -> None:
    """Give all ranks the value that most of them hold. Called by all ranks, with the same drifts in the same order."""
    for drift in found:
        block = dict(pieces(tensors[drift.name])).get(drift.offsets) if drift.name in tensors else None
        agreed = ranks.of_one(drift.camps[0][0], block.cpu() if block is not None else None)
        if block is not None and any(ranks.rank in camp for camp in drift.camps[1:]):
            block.copy_(agreed)


def listing(faults: Iterable[object]) -> str:
    """The first few faults, and how many more there are."""
    texts = list(dict.fromkeys(map(str, faults)))
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
