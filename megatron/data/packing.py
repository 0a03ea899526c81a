"""Which examples share a sample: best-fit packing, so that almost no position is padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Packs:
    """`examples` [n] in the order of the samples; sample i holds those from `starts[i]` to `starts[i + 1]`."""

    examples: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1


def order_examples(
    sizes: npt.NDArray[np.int64], *, wanted: int | None, capacity: int | None, seed: int, first: int = 0
) -> Packs:
    """Samples from as many shuffled passes over the examples as are needed.

    Args:
        sizes: [examples] positions that each takes, at most `capacity`; 0 leaves an example out.
        wanted: how many samples at least; None for one pass.
        capacity: positions of a sample that takes several examples; None puts each into a sample of its own.
        seed: of the order; another pass has another order.
        first: number that the first example gets in the result.
    """
    usable = np.flatnonzero(sizes)
    passes: list[Packs] = []
    samples = 0
    while not passes or (wanted is not None and samples < wanted):
        rng = np.random.RandomState((seed + 0x9E37 * len(passes)) % 2**32)
        order = rng.permutation(usable)
        if capacity is None:
            packs = Packs(order, np.arange(len(order) + 1))
        else:
            packs = _shuffled(best_fit(sizes[order], capacity), order, rng)
        samples += len(packs)
        passes.append(packs)
    starts = [packs.starts[1:] for packs in passes]
    offsets = np.cumsum([0, *(len(packs.examples) for packs in passes[:-1])])
    return Packs(
        np.concatenate([packs.examples for packs in passes]) + first,
        np.concatenate([[0], *(start + offset for start, offset in zip(starts, offsets, strict=True))]).astype(
            np.int64
        ),
    )


def best_fit(sizes: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """[n]: the number of the pack that each item goes to.

    Each item in turn goes to the pack with the least space that takes it, or opens another.
    """
    packs = np.empty(len(sizes), np.int64)
    # Bit r of `free` is set while a pack with r positions left is in `by_space[r]`: finding the best one is then a few
    # operations on one large number instead of a search.
    free, by_space, opened = 0, [[] for _ in range(capacity + 1)], 0
    for item, size in enumerate(sizes.tolist()):
        fitting = free >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            pack = by_space[space].pop()
            if not by_space[space]:
                free ^= 1 << space
        else:
            space, pack = capacity, opened
            opened += 1
        left = space - size
        if left:
            if not by_space[left]:
                free |= 1 << left
            by_space[left].append(pack)
        packs[item] = pack
    return packs


def _shuffled(packs: npt.NDArray[np.int64], order: npt.NDArray[np.int64], rng: np.random.RandomState) -> Packs:
    """Packs in random order: those that were opened first hold the longest examples."""
    number = int(packs.max(initial=-1)) + 1
    place = rng.permutation(number)[packs]
    starts = np.concatenate(([0], np.cumsum(np.bincount(place, minlength=number))))
    return Packs(order[np.argsort(place, kind="stable")], starts)
