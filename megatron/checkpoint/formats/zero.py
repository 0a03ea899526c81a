"""DeepSpeed's ZeRO files: float32 weights and moments, flattened and shared out over data-parallel ranks.

Stages 1 and 2: every rank has one flat tensor per group of parameters, and a table of which part of which parameter is
where in it. Stage 3: every rank has an equal part of every parameter, in the order of the parameters.
Experts have groups of their own, which only the ranks with the same experts share out; a rank numbers its experts from
0 on. Stage 3 has no experts.
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

_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")
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
    contents = [load_torch(file) for file in files]
    states = [content["optimizer_state_dict"] for content in contents]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    if "fp32_flat_groups" in states[0]:
        fragments = _fragments_of_stage_3(states, groups)
    else:
        settings = contents[0].get("ds_config") or {}
        data_first = bool(settings.get("use_data_before_expert_parallelism"))
        fragments = _fragments(states, _Experts(_expert_counts(shapes), data_first))
    entries = {entry: _view(parts, shapes, files[0].parent) for entry, parts in fragments.items() if parts}
    return ZeroStates(entries, _steps(states[0]))


@dataclass(frozen=True)
class _Experts:
    """How ranks number their experts.

    Attributes:
        counts: what stands before the number of an expert -> how many experts a rank has there.
        data_first: neighbouring ranks have the same experts, not different ones (use_data_before_expert_parallelism).
    """

    counts: Mapping[str, int]
    data_first: bool

    def full_name(self, name: str, rank: int, ranks: int, sharing: int) -> str:
        """The name with the number that the expert has among those of all ranks.

        Args:
            name: on the rank.
            rank, ranks: data-parallel rank, and their number.
            sharing: how many ranks share the parameter out.
        """
        match = _EXPERT.fullmatch(name)
        if match is None:
            return name
        expert_rank = rank // sharing if self.data_first else rank % (ranks // sharing)
        return f"{match[1]}{expert_rank * self.counts[match[1]] + int(match[2])}{match[3]}"


def _expert_counts(shapes: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in shapes:
        if match := _EXPERT.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _fragments(states: Sequence[Mapping[str, Any]], experts: _Experts) -> dict[str, dict[str, list[_Fragment]]]:
    """Stages 1 and 2: entry -> parameter -> its parts in order."""
    found: dict[str, dict[str, list[_Fragment]]] = {entry: {} for entry in ENTRIES}
    for rank, state in enumerate(states):
        moments = state["base_optimizer_state"]["state"]
        sharing = state.get("partition_count")
        for group, mapping in enumerate(state["param_slice_mappings"]):
            flats = {WEIGHTS: state["single_partition_of_fp32_groups"][group], **moments.get(group, {})}
            owners = sharing[group] if isinstance(sharing, Sequence) else len(states)
            for name, place in mapping.items():
                full = experts.full_name(name, rank, len(states), owners)
                for entry in ENTRIES:
                    if isinstance(flats.get(entry), Tensor):
                        part = _Fragment(flats[entry], place.start, place.numel)
                        found[entry].setdefault(full, []).append(part)
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
    """The parameters put together.

    Args:
        parts: of each parameter in order.
        shapes: of the parameters; of experts those that one rank has are enough.
        where: the checkpoint, for messages.
    """
    first = {name: _EXPERT.sub(r"\g<1>0\g<3>", name) for name in parts}  # all experts have the shapes of the first
    for name, pieces in parts.items():
        if first[name] not in shapes or sum(piece.length for piece in pieces) != math.prod(shapes[first[name]]):
            raise CorruptCheckpoint(f"{where}: {name} is not complete in the optimizer files")

    def read(name: str) -> Tensor:
        pieces = [piece.flat.detach()[piece.start : piece.start + piece.length] for piece in parts[name]]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(*shapes[first[name]])

    return LazyTensors({name: TensorRecord(tuple(shapes[first[name]]), "float32") for name in parts}, read)


def _steps(state: Mapping[str, Any]) -> int | None:
    """Steps that the optimizer has taken; different optimizers note them in different places."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or {}
    places = [*base.get("state", {}).values(), *base.get("param_groups", ())]
    for place in places:
        if isinstance(place, Mapping) and "step" in place:
            return int(place["step"])
    return None
