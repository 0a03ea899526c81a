"""From flags to pipeline stages: how many there are, and how many layers each one has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"]

_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
_ENDS = ("standalone_embedding_stage", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
NAMES = (*_VIRTUAL, *_ENDS, *_COUNTED, "pipeline_model_parallel_layout", "pipeline_schedule")
"""The settings that say how a pipeline is cut and run, beside its size."""


class PipelineError(ValueError):
    """Flags that do not describe a pipeline; the message names what to change."""


@dataclass(frozen=True)
class Split:
    """A pipeline.

    Attributes:
        schedule: the order of the work.
        chunks: stages of each rank.
        layers: of each stage, from the embedding to the loss.
    """

    schedule: Schedule
    chunks: int
    layers: tuple[int, ...]


def split(settings: Mapping[str, Any]) -> Split:
    """The pipeline that the settings in `NAMES`, the number of layers and of pipeline ranks describe.

    Raises:
        PipelineError: they contradict each other, or the layers cannot be cut like that.
    """
    ends, counted = _flags(settings, _ENDS), _flags(settings, _COUNTED)
    layout = _flags(settings, ("pipeline_model_parallel_layout",))
    if ways := [ways[0] for ways in (layout, ends, counted) if ways][1:]:
        raise PipelineError(f"{(layout or ends)[0]} and {ways[0]}: give one way to cut the layers")
    if (per_stage := settings["num_layers_per_virtual_pipeline_stage"]) and (ends or counted):
        raise PipelineError(f"--num-layers-per-virtual-pipeline-stage {per_stage}: not with {(ends or counted)[0]}")
    if len(used := _flags(settings, _VIRTUAL) + layout) > 1:
        raise PipelineError(f"{' and '.join(used)}: give one of them")
    ranks, num_layers = settings["pipeline_model_parallel_size"], settings["num_layers"]
    if layout:
        layers = read_layout(settings["pipeline_model_parallel_layout"], ranks, num_layers)
        chunks = len(layers) // ranks
    else:
        chunks = _chunks(settings)
        layers = _unequal_ends(settings, chunks) if ends else _equal(settings, ranks * chunks)
    return Split(_schedule(settings["pipeline_schedule"], chunks, bool(ends)), chunks, layers)


def _flags(settings: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Those of the settings that are used, as flags."""
    return ["--" + name.replace("_", "-") for name in names if settings[name] not in (None, False)]


def _schedule(asked: Schedule | None, chunks: int, unequal_ends: bool) -> Schedule:
    """The schedule, or the usual one for so many stages per rank."""
    if asked is None:
        return "interleaved" if chunks > 1 else "1f1b"
    if asked in ("gpipe", "1f1b") and chunks > 1:
        raise PipelineError(f"--pipeline-schedule {asked}: a rank has one stage, not {chunks}; take interleaved")
    if asked == "interleaved" and chunks == 1:
        raise PipelineError(
            "--pipeline-schedule interleaved: a rank has several stages; give --num-virtual-stages-per-pipeline-rank"
        )
    if asked == "zbv" and (chunks != 2 or unequal_ends):
        raise PipelineError(
            f"--pipeline-schedule zbv: a rank has 2 stages, not {chunks}, and the first rank has the first and the "
            "last one; leave the other flags out, or give --pipeline-model-parallel-layout"
        )
    return asked


def _chunks(settings: Mapping[str, Any]) -> int:
    """Stages of each rank."""
    per_rank, per_stage = settings["num_virtual_stages_per_pipeline_rank"], settings[_VIRTUAL[0]]
    if per_stage is None:
        return int(per_rank or (2 if settings["pipeline_schedule"] == "zbv" else 1))
    layers = per_stage * settings["pipeline_model_parallel_size"]
    if settings["num_layers"] % layers:
        raise PipelineError(
            f"--num-layers-per-virtual-pipeline-stage {per_stage}: --num-layers {settings['num_layers']} must be a "
            f"multiple of {layers} = {per_stage} x --pipeline-model-parallel-size"
        )
    return int(settings["num_layers"] // layers)


def _equal(settings: Mapping[str, Any], stages: int) -> tuple[int, ...]:
    """Equal stages; the embedding and the loss may count as a layer each."""
    embedding, loss = (int(settings[name]) for name in _COUNTED)
    size, rest = divmod(settings["num_layers"] + embedding + loss, stages)
    if rest or size == 0:
        counted = f" and {embedding + loss} that count as one" if embedding + loss else ""
        raise PipelineError(
            f"--num-layers {settings['num_layers']}{counted}: must be a multiple of the {stages} pipeline stages; "
            "change one of the numbers, or give --decoder-first-pipeline-num-layers, "
            "--decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout"
        )
    layers = [size] * stages
    layers[0] -= embedding
    layers[-1] -= loss
    return tuple(layers)


def _unequal_ends(settings: Mapping[str, Any], chunks: int) -> tuple[int, ...]:
    """A given number of layers for the first and the last rank; those between share the others equally."""
    alone, first, last = (settings[name] for name in _ENDS)
    if alone and first is not None:
        raise PipelineError("--standalone-embedding-stage and --decoder-first-pipeline-num-layers: give one of them")
    before = [0] if alone else [first] if first is not None else []
    after = [last] if last is not None else []
    between = settings["pipeline_model_parallel_size"] - len(before) - len(after)
    left = settings["num_layers"] - sum(before) - sum(after)
    size, rest = divmod(left, between) if between > 0 else (0, left)
    if rest or left < 0 or (between and not size):
        raise PipelineError(
            f"--num-layers {settings['num_layers']}: without those of the first and the last rank {left} layers are "
            f"left, for {between} ranks; they must share them equally"
        )
    of_ranks = [*before, *[size] * between, *after]
    if uneven := [count for count in of_ranks if count % chunks]:
        raise PipelineError(f"a pipeline rank has {uneven[0]} layers, which cannot be cut into {chunks} equal stages")
    return tuple(count // chunks for count in of_ranks) * chunks


def read_layout(text: str, ranks: int, num_layers: int) -> tuple[int, ...]:
    """Layers of each stage of a layout in Megatron's notation.

    Stages are separated by `|` and hold the embedding `E`, layers `t` and the loss `L`; `x*3` repeats x, `(..)*3` a
    group; commas and spaces mean nothing: `Et*3|(t*4|)*6t*3L`.

    Raises:
        PipelineError: it is no such text, or not one for this model.
    """
    flag = f"--pipeline-model-parallel-layout {text}"
    expanded = re.sub(r"[\s,]", "", text)
    while match := re.search(r"\(([^()]*)\)(?:\*(\d+))?|([EtLm|])\*(\d+)", expanded):
        group, times, letter, letters = match.groups()
        piece = letter * int(letters) if letter else group * int(times or 1)
        expanded = expanded[: match.start()] + piece + expanded[match.end() :]
    if not re.fullmatch(r"E(t|\|)*L", expanded):
        raise PipelineError(
            f"{flag}: must be E, then t for each layer and | between stages, then L; m is not supported"
        )
    stages = expanded.split("|")
    if len(stages) % ranks or "" in stages:
        raise PipelineError(
            f"{flag}: has {len(stages)} stages, {stages.count('')} of them empty; there must be something in each and "
            f"as many for each of --pipeline-model-parallel-size {ranks}"
        )
    layers = tuple(stage.count("t") for stage in stages)
    if sum(layers) != num_layers:
        raise PipelineError(f"{flag}: has {sum(layers)} layers, --num-layers is {num_layers}")
    return layers
