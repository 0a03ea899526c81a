"""Two sets of files of the tensor logger, tensor by tensor (`tools/compare_tensors.py`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAME = re.compile(r"tensor_logger_rank_(\d+)_iter_(\d+)\.pt")


class CompareError(ValueError):
    """Two folders that cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two tensors of one place. Errors are the largest absolute difference, and that relative to the largest value."""

    iteration: int
    rank: int
    kind: str
    name: str
    index: int
    absolute: float
    relative: float
    problem: str = ""
    """Why they cannot be compared; empty when they can."""

    def __str__(self) -> str:
        place = f"iteration {self.iteration} rank {self.rank} {self.kind} {self.name}[{self.index}]"
        return f"{place}: {self.problem or f'absolute {self.absolute:.3e} relative {self.relative:.3e}'}"


def compare(first: Path, second: Path) -> list[Difference]:
    """One entry per tensor, in the order in which the first run came to them.

    Raises:
        CompareError: a folder has no such files, or they are of other ranks or iterations than the other's.
    """
    ours, theirs = _files(first), _files(second)
    if ours.keys() != theirs.keys():
        only = ", ".join(f"rank {rank} iteration {number}" for number, rank in sorted(ours.keys() ^ theirs.keys()))
        raise CompareError(f"{first} and {second} are not of the same ranks and iterations; only one has {only}")
    return [entry for place in sorted(ours) for entry in _compare_files(ours[place], theirs[place], *place)]


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """The files by iteration and rank."""
    found = {(int(m[2]), int(m[1])): path for path in folder.glob("*.pt") if (m := _NAME.fullmatch(path.name))}
    if not found:
        raise CompareError(f"{folder} has no files of the tensor logger (tensor_logger_rank_R_iter_N.pt)")
    return found


def _compare_files(first: Path, second: Path, iteration: int, rank: int) -> Iterator[Difference]:
    ours, theirs = (torch.load(path, weights_only=True)[iteration] for path in (first, second))
    for kind in dict.fromkeys([*ours, *theirs]):
        mine, other = ours.get(kind, {}), theirs.get(kind, {})
        for name in dict.fromkeys([*mine, *other]):
            for index, values in enumerate(_paired(mine, other, name)):
                yield _difference(*values, iteration=iteration, rank=rank, kind=kind, name=name, index=index)


def _paired(
    ours: Mapping[str, list[Tensor]], theirs: Mapping[str, list[Tensor]], name: str
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    mine, other = ours.get(name, []), theirs.get(name, [])
    for index in range(max(len(mine), len(other))):
        yield mine[index] if index < len(mine) else None, other[index] if index < len(other) else None


def _difference(first: Tensor | None, second: Tensor | None, **place: Any) -> Difference:
    infinite: dict[str, float] = {"absolute": float("inf"), "relative": float("inf")}
    if first is None or second is None:
        return Difference(**place, **infinite, problem=f"only the {'second' if first is None else 'first'} run has it")
    if first.shape != second.shape:
        return Difference(**place, **infinite, problem=f"shapes {list(first.shape)} and {list(second.shape)}")
    one, two = first.double(), second.double()
    absolute = (one - two).abs().max().item() if one.numel() else 0.0
    largest = one.abs().max().item() if one.numel() else 0.0
    return Difference(**place, absolute=absolute, relative=absolute / largest if largest else absolute)
