"""Mixtures of corpora, and the division of a corpus into train, valid and test."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_cache import IndexCache, load_array
from megatron.data.native import index_builder

SPLITS = ("train", "valid", "test")
Order = tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]
# The blend may have very many samples; look at it in pieces.
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Corpora to mix: prefixes, and their weights (sum 1) or None for "all of each, once"."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(entries: Sequence[str], flag: str = "--data-path") -> Blend:
    """Read `path`, `path path ...` or `weight path weight path ...`.

    Raises:
        DataError: nothing given, weights for some paths only, or a weight that is not positive.
    """
    if not entries:
        raise DataError(f"{flag} names no data.")
    weights = [_number(entry) for entry in entries[::2]]
    if len(entries) % 2 or not any(weight is not None for weight in weights):
        if any(_number(entry) is not None and not _exists(entry) for entry in entries):
            raise DataError(f"{flag} {' '.join(entries)}: give a weight before every path, or none at all.")
        return Blend(prefixes=tuple(entry.strip() for entry in entries), weights=None)
    given = [weight for weight in weights if weight is not None]
    if len(given) != len(weights):
        raise DataError(f"{flag} {' '.join(entries)}: give a weight before every path, or none at all.")
    for weight, prefix in zip(given, entries[1::2], strict=True):
        if not 0 < weight < math.inf:
            raise DataError(f"{flag}: the weight of {prefix} is {weight}; it must be positive. Leave out unused data.")
    return Blend(prefixes=tuple(entry.strip() for entry in entries[1::2]), weights=_normalized(given))


def parse_split(split: str) -> tuple[tuple[float, float] | None, ...]:
    """The part of a corpus, as (start, end) in [0, 1], of train, valid and test; None for an empty part.

    Args:
        split: up to three numbers, separated by `,` or `/`; only their proportions count.

    Raises:
        DataError: not such numbers.
    """
    values = [_number(part) for part in re.split(r"[,/]", split)]
    numbers = [value for value in values if value is not None and 0 <= value < math.inf]
    if len(numbers) != len(values) or not 1 <= len(values) <= len(SPLITS) or sum(numbers) <= 0:
        raise DataError(f"--split {split!r}: give up to three numbers, none negative, like 969,30,1 or 0.9,0.1.")
    shares = _normalized(numbers + [0.0] * (len(SPLITS) - len(numbers)))
    ends = list(accumulate(shares, initial=0.0))
    return tuple((start, end) if start < end else None for start, end in pairwise(ends))


def split_range(part: tuple[float, float], num_sequences: int) -> tuple[int, int]:
    """The sequences [first, last) of one part of a corpus.

    Megatron Core's rounding. Older Megatrons rounded each part on its own, which can move a boundary by one sequence.
    """
    first, last = (round(bound * float(num_sequences)) for bound in part)
    return first, last


def dataset_sizes(weights: Sequence[float], num_samples: int, surplus: float) -> tuple[list[int], list[int]]:
    """For each corpus of a blend: samples it contributes, and samples to prepare with the surplus (0.005 = 0.5 %)."""
    target = [math.ceil(num_samples * weight) for weight in weights]
    return target, [math.ceil(size * (1 + surplus)) for size in target]


class Samples(Protocol):
    """Something that has samples: `seq_length + 1` tokens each, or instruction samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class BlendedDataset:
    """Samples of several datasets, mixed.

    Args:
        datasets: what is mixed.
        order: (dataset int16 [n], sample of that dataset int64 [n]).
    """

    def __init__(self, datasets: Sequence[Samples], order: Order | MappedOrder) -> None:
        self.datasets = list(datasets)
        self._order = order
        self._numbers, self._samples = order.load() if isinstance(order, MappedOrder) else order

    def __reduce__(self) -> tuple[type[BlendedDataset], tuple[Any, ...]]:
        return BlendedDataset, (self.datasets, self._order)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        """Sample `index` of the mixture."""
        dataset = self.datasets[int(self._numbers[index])]
        return dataset[int(self._samples[index])]


@dataclass(frozen=True)
class MappedOrder:
    """The order of a blend where it is cached."""

    numbers: Path
    samples: Path

    def load(self) -> Order:
        """Map the two arrays."""
        return load_array(self.numbers), load_array(self.samples)


def blend_by_weight(
    datasets: Sequence[Samples], weights: Sequence[float], size: int, cache: IndexCache | None
) -> BlendedDataset:
    """Mix greedily: each next sample comes from the dataset that lags most behind its weight. Same order as Megatron.

    Raises:
        DataError: a dataset has fewer samples than its weight takes.
    """
    # Megatron normalizes again what is already normalized; where that moves the last bit, it decides ties.
    values = np.array(_normalized(weights), dtype=np.float64)
    available = [len(dataset) for dataset in datasets]

    def build() -> Order:
        order: Order = index_builder().build_blending_indices(values, size)
        _check_supply(order[0], available)
        return order

    return _cached(datasets, {"weights": values.tolist(), "size": size, "available": available}, build, cache)


def blend_all(datasets: Sequence[Samples], cache: IndexCache | None) -> BlendedDataset:
    """Mix in proportion to the sizes so that every sample appears once. Same order as Megatron Core."""
    sizes = np.array([len(dataset) for dataset in datasets], dtype=np.int64)
    key = {"sizes": sizes.tolist()}
    return _cached(datasets, key, lambda: index_builder().build_exhaustive_blending_indices(sizes), cache)


def _cached(
    datasets: Sequence[Samples], key: dict[str, object], build: Callable[[], Order], cache: IndexCache | None
) -> BlendedDataset:
    if cache is None:
        return BlendedDataset(datasets, build())
    paths = cache.load_or_build("blend", key, lambda: dict(zip(("numbers", "samples"), build(), strict=True)))
    return BlendedDataset(datasets, MappedOrder(paths["numbers"], paths["samples"]))


def _check_supply(numbers: npt.NDArray[np.int16], available: Sequence[int]) -> None:
    counts = np.zeros(len(available), np.int64)
    for first in range(0, len(numbers), _CHUNK):
        counts += np.bincount(numbers[first : first + _CHUNK], minlength=len(available))
    for number, (count, supply) in enumerate(zip(counts.tolist(), available, strict=True)):
        if count > supply:
            raise DataError(
                f"The blend takes {count} samples of its corpus number {number}, which was prepared with {supply}. "
                "Prepare more with a larger --mid-level-dataset-surplus."
            )


def _normalized(values: Sequence[float]) -> tuple[float, ...]:
    # numpy's pairwise sum, as in Megatron: the last bit decides ties.
    array = np.array(values, dtype=np.float64)
    return tuple((array / np.sum(array)).tolist())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _exists(prefix: str) -> bool:
    return Path(f"{prefix}.idx").is_file()
