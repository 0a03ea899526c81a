"""DeepSpeed's ZeRO files: float32 weights and moments, flattened and shared out over data-parallel ranks.

Stages 1 and 2: every rank has one flat tensor per group of parameters, and a table of which part of which parameter is
where in it. Stage 3: every rank has an equal part of every parameter, in the order of the parameters.
Read as views of mapped files; a parameter is put together when it is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CorruptCheckpoint
from megatron.checkpoint.formats.lazy import LazyTensors
from megatron.checkpoint.formats.torch_read import load_torch
from megatron.checkpoint.manifest import TensorRecord

_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
WEIGHTS = "fp32"
ENTRIES = (WEIGHTS, "exp_avg", "exp_avg_sq")
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class _Fragment:
    """A part of a flattened parameter: `length` elements of `flat` from `start` on."""

    flat: Tensor
    start: int
    length: int


@dataclass(frozen=True)
class ZeroStates:
    """What the ZeRO files of one model-parallel rank hold.

    Attributes:
        entries: float32 weights ("fp32") and moments, by DeepSpeed's parameter names.
        steps: optimizer steps done; None if not recorded.
    """

    entries: Mapping[str, LazyTensors]
    steps: int | None


def zero_files(path: Path) -> dict[int, list[Path]]:
    """The optimizer files of a checkpoint by model-parallel rank, each list in the order of data-parallel ranks.

    Raises:
        CorruptCheckpoint: some are missing.
    """
    found: dict[int, dict[int, Path]] = {}
    for child in path.iterdir():
        if match := _FILE.fullmatch(child.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = child
    size = max((max(ranks) + 1 for ranks in found.values()), default=0)
    for rank, files in found.items():
        if absent := sorted(set(range(size)) - files.keys()):
            raise CorruptCheckpoint(f"{path}: no optimizer file of data-parallel ranks {absent} for mp_rank_{rank:02d}")
    return {rank: [files[at] for at in range(size)] for rank, files in sorted(found.items())}


def open_zero(files: Sequence[Path], groups: Sequence[Shapes]) -> ZeroStates:
    """Open the files of one model-parallel rank.

    Args:
        files: of all data-parallel ranks, in their order.
        groups: shapes of the parameters on this model-parallel rank, by DeepSpeed's names and in its order; one
            dictionary per group of parameters.

    Raises:
        CorruptCheckpoint: a file cannot be read or lacks a part of a parameter.
    """
    states = [load_torch(file)["optimizer_state_dict"] for file in files]
    whole = "fp32_flat_groups" in states[0]
    fragments = _fragments_of_stage_3(states, groups) if whole else _fragments(states)
    shapes = {name: shape for group in groups for name, shape in group.items()}
    entries = {entry: _view(parts, shapes, files[0].parent) for entry, parts in fragments.items() if parts}
    return ZeroStates(entries, _steps(states[0]))


def _fragments(states: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[_Fragment]]]:
    """Stages 1 and 2: entry -> parameter -> its parts in order."""
    found: dict[str, dict[str, list[_Fragment]]] = {entry: {} for entry in ENTRIES}
    for state in states:
        moments = state["base_optimizer_state"]["state"]
        for group, mapping in enumerate(state["param_slice_mappings"]):
            flats = {WEIGHTS: state["single_partition_of_fp32_groups"][group], **moments.get(group, {})}
            for name, place in mapping.items():
                for entry in ENTRIES:
                    if isinstance(flats.get(entry), Tensor):
                        part = _Fragment(flats[entry], place.start, place.numel)
                        found[entry].setdefault(name, []).append(part)
    return found


def _fragments_of_stage_3(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Shapes]
) -> dict[str, dict[str, list[_Fragment]]]:
    """Stage 3: a flat tensor per group with this rank's share of each of its parameters, one after the other."""
    found: dict[str, dict[str, list[_Fragment]]] = {entry: {} for entry in ENTRIES}
    for rank, state in enumerate(states):
        moments = state["optimizer_state_dict"]["state"]
        for index, shapes in enumerate(groups):
            flats = {WEIGHTS: state["fp32_flat_groups"][index], **moments.get(index, {})}
            start = 0
            for name, shape in shapes.items():
                length = math.prod(shape)
                share = -(-length // len(states))
                part = start, max(0, min(share, length - rank * share))
                start += share
                for entry in ENTRIES:
                    if isinstance(flats.get(entry), Tensor):
                        found[entry].setdefault(name, []).append(_Fragment(flats[entry], *part))
    return found


def _view(parts: Mapping[str, Sequence[_Fragment]], shapes: Shapes, where: Path) -> LazyTensors:
    for name, pieces in parts.items():
        if name not in shapes or sum(piece.length for piece in pieces) != math.prod(shapes[name]):
            raise CorruptCheckpoint(f"{where}: {name} is not complete in the optimizer files")

    def read(name: str) -> Tensor:
        pieces = [piece.flat.detach()[piece.start : piece.start + piece.length] for piece in parts[name]]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(*shapes[name])

    return LazyTensors({name: TensorRecord(tuple(shapes[name]), "float32") for name in parts}, read)


def _steps(state: Mapping[str, Any]) -> int | None:
    """Steps that the optimizer has taken; different optimizers note them in different places."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or {}
    places = [*base.get("state", {}).values(), *base.get("param_groups", ())]
    for place in places:
        if isinstance(place, Mapping) and "step" in place:
            return int(place["step"])
    return None
