"""The files of Megatron's model-parallel ranks, and what their tensors are called in the whole model.

    mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt     tensor-parallel rank TT, pipeline stage PPP, expert-parallel rank EEE

A number is left out where there is one rank only. A rank numbers its layers and its experts from 0 on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats.torch_read import flatten, load_torch

RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
FILES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"((?:language_model\.(?:encoder\.)?|decoder\.)layers\.)(\d+)(\..*)")
_EXPERT = re.compile(
    r"(.*\.(?:local_experts|deepspeed_experts|moe_layer\.experts\.experts)\.|.*\.experts\.linear_fc[12]\.weight)"
    r"(\d+)(|\..*)"
)


@dataclass(frozen=True, kw_only=True)
class RankFile:
    """The file of one rank.

    Attributes:
        path: where it is.
        state: what it holds.
        chunks: the parts of the model that the rank has, in the order of an interleaved schedule: full name -> tensor,
            in the order of the modules.
        experts: full names of the tensors that only this expert-parallel rank has; empty without expert parallelism.
    """

    path: Path
    state: Mapping[str, Any]
    chunks: Sequence[Mapping[str, Tensor]]
    experts: frozenset[str]


@dataclass(frozen=True)
class TensorRank:
    """All files of one tensor-parallel rank: of every stage and expert-parallel rank."""

    files: Sequence[RankFile]

    def model(self) -> dict[str, Tensor]:
        """All tensors by full name; of those that several files have, the first."""
        whole: dict[str, Tensor] = {}
        for file in self.files:
            for chunk in file.chunks:
                whole = {**chunk, **whole}
        return whole


def tensor_ranks(path: Path) -> list[TensorRank]:
    """Open the files of a checkpoint, by tensor-parallel rank.

    Raises:
        CorruptCheckpoint: some are missing or damaged.
        CheckpointError: experts are split over another number of ranks than the rest.
    """
    found: dict[tuple[int, ...], Path] = {}
    for child in path.iterdir():
        if match := RANK_FOLDER.fullmatch(child.name):
            file = next((child / name for name in FILES if (child / name).is_file()), None)
            if file is None:
                raise CorruptCheckpoint(f"{child} has no {FILES[0]}")
            found[tuple(int(number) for number in match.groups() if number)] = file
    first = load_torch(found[min(found)])
    args = vars(first["args"]) if first.get("args") is not None else {}
    split = args.get("expert_tensor_parallel_size")
    if args.get("num_experts") and split not in (None, args.get("tensor_model_parallel_size")):
        raise CheckpointError(
            f"{path}: its experts are split over {split} tensor-parallel ranks (--expert-tensor-parallel-size), the "
            f"rest over {args.get('tensor_model_parallel_size')}: save it with --ckpt-format torch_dist"
        )
    of_experts = int(args.get("expert_model_parallel_size") or 1) > 1
    placed = {_place(numbers, of_experts=of_experts): file for numbers, file in found.items()}
    sizes = [1 + max(place[at] for place in placed) for at in range(3)]
    if absent := [place for place in product(*map(range, sizes)) if place not in placed]:
        shown = ", ".join(_described(place, sizes) for place in absent[:4])
        raise CorruptCheckpoint(f"{path}: {len(absent)} of {len(absent) + len(placed)} files are missing: {shown}")
    return [_tensor_rank(placed, rank, sizes[1], sizes[2]) for rank in range(sizes[0])]


def _place(numbers: Sequence[int], *, of_experts: bool) -> tuple[int, int, int]:
    """Tensor-parallel rank, stage, expert-parallel rank."""
    if len(numbers) == 2 and of_experts:
        return numbers[0], 0, numbers[1]
    rank, stage, expert = (*numbers, 0, 0)[:3]
    return rank, stage, expert


def _described(place: tuple[int, ...], sizes: Sequence[int]) -> str:
    experts = f", expert-parallel rank {place[2]}" if sizes[2] > 1 else ""
    return f"tensor-parallel rank {place[0]} of stage {place[1]}{experts}"


def _tensor_rank(files: Mapping[tuple[int, int, int], Path], rank: int, stages: int, experts: int) -> TensorRank:
    states = [[load_torch(files[rank, stage, expert]) for expert in range(experts)] for stage in range(stages)]
    starts = _first_layers([of_stage[0] for of_stage in states], files[rank, 0, 0].parent.parent)
    result = []
    for stage, expert in product(range(stages), range(experts)):
        chunks, own = [], set()
        for name, start in starts[stage].items():
            tensors = _numbered(_tensors(states[stage][expert][name]), start, expert)
            chunks.append(tensors)
            own |= {full for full in tensors if experts > 1 and _EXPERT.fullmatch(full)}
        result.append(
            RankFile(
                path=files[rank, stage, expert], state=states[stage][expert], chunks=chunks, experts=frozenset(own)
            )
        )
    return TensorRank(result)


def _first_layers(stages: Sequence[Mapping[str, Any]], path: Path) -> list[dict[str, int]]:
    """Of each stage: name of a chunk in its file -> number of its first layer in the whole model."""
    count = sum(f"model{index}" in stages[0] for index in range(len(stages[0])))
    names = [f"model{index}" for index in range(count)] or ["model"]
    starts: list[dict[str, int]] = [{} for _ in stages]
    start = 0
    for name in names:  # of interleaved schedules: the first chunk of every stage comes before the second of any
        for stage, own in zip(stages, starts, strict=True):
            if name not in stage:
                raise CorruptCheckpoint(f"{path}: a file has no {name}")
            own[name] = start
            start += len({match[2] for key in _tensors(stage[name]) if (match := _LAYER.fullmatch(key))})
    return starts


def _tensors(tree: Any) -> dict[str, Tensor]:
    return {_current_name(key): tensor for key, tensor in flatten(tree).items()}


def _current_name(name: str) -> str:
    """The name that a tensor of the first versions of Megatron has today."""
    if name.startswith("language_model.transformer."):
        name = name.replace(".transformer.", ".encoder.", 1).replace(".attention.", ".self_attention.", 1)
    return name


def _numbered(tensors: Mapping[str, Tensor], first_layer: int, expert_rank: int) -> dict[str, Tensor]:
    """The tensors of a chunk under the numbers that their layers and experts have in the whole model."""
    experts = [match for name in tensors if (match := _EXPERT.fullmatch(name))]
    counts = {match[1]: 1 + max(int(other[2]) for other in experts if other[1] == match[1]) for match in experts}

    def full_name(name: str) -> str:
        if match := _EXPERT.fullmatch(name):
            name = f"{match[1]}{expert_rank * counts[match[1]] + int(match[2])}{match[3]}"
        match = _LAYER.fullmatch(name)
        return f"{match[1]}{int(match[2]) + first_layer}{match[3]}" if match else name

    return {full_name(name): tensor for name, tensor in tensors.items()}
