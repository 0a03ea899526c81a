"""Checkpoints of DeepSpeed, as Megatron-DeepSpeed and AscendSpeed write them.

    latest                                        "global_step100"
    global_step100/
      layer_LL-model_TT-model_states.pt           pipeline module LL, tensor-parallel rank TT
    layer_M_expert_E_mp_rank_XX_model_states.pt expert E of the M-th layer with experts of a stage
      mp_rank_XX_model_states.pt                  arguments and counters; without pipeline modules all weights, and with
                                                  them those of a stage, if it has experts
      *zero_pp_rank_D_mp_rank_XX_optim_states.pt  optimizer state of data-parallel rank D, see `zero`
      expp_rank_E_mp_rank_XX_optim_states.pt      without ZeRO: not read, as parameters have no names there

All of them are read. Written are weights, arguments and counters; optimizer state is written in the universal form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.files import write_synced
from megatron.checkpoint.folder import TRACKER
from megatron.checkpoint.formats.assets import FOLDER, assets_beside
from megatron.checkpoint.formats.lazy import LazyTensors, in_memory
from megatron.checkpoint.formats.megatron import (
    client_state,
    progress_in,
    record_in,
    tracked,
    write_stage,
)
from megatron.checkpoint.formats.merge import Megatron, logical_weights, to_dialect
from megatron.checkpoint.formats.model import StoredModel, check
from megatron.checkpoint.formats.names import PIPELINE, Piece
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions, described_architecture, new_folder
from megatron.checkpoint.formats.parts import even_stages
from megatron.checkpoint.formats.torch_read import flatten, load_torch
from megatron.checkpoint.formats.torch_write import TorchFile
from megatron.checkpoint.formats.zero import WEIGHTS, open_zero, zero_files

_LATEST = "latest"
_LAYER_FILE = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"(?:.*\.layers\.)?(\d+)\..*\.deepspeed_experts\.(\d+)\..*")
_TIED = "tied_modules.embed."
_MODULE = re.compile(rf"(\d+|{re.escape(_TIED[:-1])})\.(.+)")
# Of the oldest DeepSpeed that this project works with: loading refuses files that name no version.
_VERSION = "0.18.9"
_EMBEDDING = "language_model.embedding."
_LAYERS = "language_model.encoder.layers."
_FINAL_NORM = "language_model.encoder.final_layernorm."
_HEAD = "language_model.output_layer."
_IN_HEAD = "lm_head."


def read(folder: Path, options: ReadOptions) -> StoredModel:
    """Open a checkpoint: the folder of a run, or one checkpoint in it.

    With `options.optimizer` and ZeRO files the weights are the float32 ones of the optimizer, else those of the model.

    Raises:
        CorruptCheckpoint: files are missing or damaged.
        CheckpointError: it does not fit its configuration, or does not describe the model.
    """
    path = _checkpoint_in(folder, options.iteration)
    files = _model_files(path)
    states = [load_torch(file) for file in files]
    record = record_in(states[0])
    assets = assets_beside(path.parent, record)
    arch = described_architecture(options, assets, record, path)
    pipeline = _pipeline(path)
    ranks = _ranks(pipeline, states, path)
    stage_3 = files[0].name.startswith("zero")
    optimizer, steps = _optimizer(path, pipeline, states, len(ranks)) if options.optimizer or stage_3 else ({}, None)
    if options.optimizer and not optimizer and (states[0].get("optimizer") or any(path.glob("expp_rank_*"))):
        options.log(
            f"WARNING: {path}: the optimizer's state was written without ZeRO, and then DeepSpeed does not note which "
            "parameters it belongs to; it is left behind"
        )
    if stage_3 and not optimizer:
        raise CorruptCheckpoint(f"{path} has no optimizer files, which hold the weights of ZeRO stage 3")
    moments = {name: parts for name, parts in optimizer.items() if name != WEIGHTS and options.optimizer}
    model = StoredModel(
        arch=arch,
        weights=logical_weights(optimizer.get(WEIGHTS, ranks), arch, options, path),
        moments={entry: logical_weights(parts, arch, options, path) for entry, parts in moments.items()},
        steps=steps if moments else None,
        assets=assets,
        settings=record,
        progress=progress_in(states[0], record),
    )
    return check(model, path)


def _checkpoint_in(folder: Path, iteration: int | None) -> Path:
    if any(_MODEL_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    path = folder / (tracked(folder, _LATEST) if iteration is None else f"global_step{iteration}")
    if not path.is_dir():
        named_by = _LATEST if iteration is None else "--ckpt-step"
        raise CorruptCheckpoint(f"{folder} has no {path.name}, which {named_by} names")
    return path


def _model_files(path: Path) -> list[Path]:
    """The files with arguments and counters in the order of model-parallel ranks.

    Raises:
        CorruptCheckpoint: one is missing.
    """
    found = {int(match[1]): child for child in path.iterdir() if (match := _MODEL_FILE.fullmatch(child.name))}
    if absent := sorted(set(range(max(found, default=0) + 1)) - found.keys()):
        raise CorruptCheckpoint(f"{path}: there is no mp_rank_{absent[0]:02d}_model_states.pt")
    return [found[number] for number in range(len(found))]


@dataclass(frozen=True)
class _Pipeline:
    """The files of pipeline modules.

    Attributes:
        prefixes: number of the module (as text) -> what stands before the names of its tensors in a model without
            pipeline parallelism. What a module is shows in its tensors: versions number them differently.
        ranks: of each tensor-parallel rank all tensors under their full names.
    """

    prefixes: Mapping[str, str]
    ranks: Sequence[Mapping[str, Tensor]]

    def full_name(self, name: str) -> str:
        """The full name of a parameter that DeepSpeed calls, for example, 2.input_layernorm.weight."""
        match = _MODULE.fullmatch(name)
        if match is None or match[1] not in self.prefixes:
            return name
        return self.prefixes[match[1]] + match[2].removeprefix(_IN_HEAD)


def _pipeline(path: Path) -> _Pipeline:
    """Open the files of the modules; there are none without pipeline parallelism.

    Raises:
        CorruptCheckpoint: one is missing.
    """
    found: dict[int, dict[int, Path]] = {}
    for child in path.iterdir():
        if match := _LAYER_FILE.fullmatch(child.name):
            found.setdefault(int(match[1]), {})[int(match[2] or 0)] = child
    size = max((max(files) + 1 for files in found.values()), default=0)
    ranks: list[dict[str, Tensor]] = [{} for _ in range(size)]
    prefixes: dict[str, str] = {}
    layers: list[int] = []
    for number, files in sorted(found.items()):
        if absent := sorted(set(range(size)) - files.keys()):
            raise CorruptCheckpoint(f"{path}: there is no layer_{number:02d}-model_{absent[0]:02d}-model_states.pt")
        modules = [flatten(load_torch(files[rank])) for rank in range(size)]
        prefixes[str(number)] = prefix = _prefix(modules[0], len(layers), files[0])
        if prefix.startswith(_LAYERS):
            layers.append(number)
        for rank, tensors in zip(ranks, modules, strict=True):
            rank.update({prefix + name.removeprefix(_IN_HEAD): tensor for name, tensor in tensors.items()})
    if layers and (absent := sorted(set(range(layers[0], layers[-1])) - set(layers))):
        raise CorruptCheckpoint(f"{path}: there is no layer_{absent[0]:02d}-model_00-model_states.pt")
    return _Pipeline({**prefixes, "tied_modules.embed": _EMBEDDING}, ranks)


def _prefix(tensors: Mapping[str, Tensor], layers: int, file: Path) -> str:
    """What stands before the names of a module's tensors in a model without pipeline parallelism.

    Args:
        tensors: of the module.
        layers: how many layers come before it.
        file: for messages.
    """
    if "word_embeddings.weight" in tensors:
        return _EMBEDDING
    if "input_layernorm.weight" in tensors:
        return f"{_LAYERS}{layers}."
    if "lm_head.weight" in tensors:
        return _HEAD
    if tensors.keys() <= {"weight", "bias"}:
        return _FINAL_NORM
    raise CheckpointMismatch(f"{file}: no module of Megatron has the tensors {', '.join(sorted(tensors)[:4])}")


def _ranks(pipeline: _Pipeline, states: Sequence[Mapping[str, Any]], path: Path) -> list[LazyTensors]:
    """The weights of each tensor-parallel rank."""
    if pipeline.ranks:
        return [in_memory(tensors) for tensors in pipeline.ranks]
    files = [flatten(state.get("module")) for state in states]
    size = len(files)
    if all(_MODULE.fullmatch(name) for name in files[0]):  # of stages, which have different modules
        size = sum(tensors.keys() == files[0].keys() for tensors in files)
    for child in sorted(path.iterdir()):
        if match := _EXPERT_FILE.fullmatch(child.name):
            files[int(match[3])].update(flatten(load_torch(child)))
    ranks = [dict(part for tensors in files[rank::size] for part in tensors.items()) for rank in range(size)]
    return [in_memory(tensors) for tensors in ranks]


def _optimizer(
    path: Path, pipeline: _Pipeline, states: Sequence[Mapping[str, Any]], ranks: int
) -> tuple[dict[str, list[LazyTensors]], int | None]:
    """What the optimizer holds: of each entry the tensors of each tensor-parallel rank; and the steps it has done."""
    files = zero_files(path)
    found: dict[str, list[LazyTensors]] = {}
    steps = None
    for rank in range(ranks if files else 0):
        stages = [
            open_zero(files[number], states[number]["param_shapes"]) for number in range(rank, len(states), ranks)
        ]
        steps = stages[0].steps
        for entry in stages[0].entries:
            found.setdefault(entry, []).append(_union([stage.entries[entry] for stage in stages], pipeline))
    return found, steps


def _union(stages: Sequence[LazyTensors], pipeline: _Pipeline) -> LazyTensors:
    """The tensors of all stages under full names; of a tied embedding, which two stages have, one."""
    places = {pipeline.full_name(name): (stage, name) for stage in reversed(stages) for name in stage.records}

    def read_one(name: str) -> Tensor:
        stage, inner = places[name]
        return stage.read(inner)

    return LazyTensors({full: stage.records[name] for full, (stage, name) in places.items()}, read_one)


def write(model: StoredModel, folder: Path, options: WriteOptions) -> None:
    """Write weights, arguments and counters for `options.tp` ranks and `options.pp` stages.

    The dialect "pipeline" makes files of pipeline modules, any other those of a model without them, which one with
    experts is unless it has stages.

    Raises:
        CheckpointError: the model cannot be divided so, or `folder` is there already.
    """
    dialect = options.dialect or (PIPELINE if model.arch.experts is None or options.pp > 1 else "megatron")
    whole = to_dialect(model, dialect, options)
    even_stages(model.arch.num_layers, options.pp)
    if not dialect.startswith(PIPELINE) and options.pp > 1:
        raise CheckpointError(
            f"--target-pipeline-parallel-size {options.pp}: DeepSpeed has stages in pipeline modules only; leave "
            f"--dialect {dialect} out"
        )
    of_ascend = dialect.startswith(("ascendspeed", "modellink"))
    tag = "release" if of_ascend and not model.iteration else f"global_step{model.iteration}"
    with new_folder(folder) as temporary:
        (temporary / tag).mkdir()
        state = {**client_state(model, whole, options), **engine_state(model, options)}
        if dialect.startswith(PIPELINE) and model.arch.experts is None:
            _write_modules(temporary / tag, whole, options)
            for rank in range(options.tp * options.pp):
                with TorchFile(temporary / tag / f"mp_rank_{rank:02d}_model_states.pt", {"module": None, **state}):
                    pass
        else:
            _write_stages(temporary / tag, whole, state, options)
        if model.assets.files:
            model.assets.copy_to(temporary / FOLDER)
        write_synced(temporary / TRACKER, str(model.iteration).encode())
        write_synced(temporary / _LATEST, tag.encode())


def engine_state(model: StoredModel, options: WriteOptions) -> dict[str, Any]:
    """What DeepSpeed's engine looks for when it loads a checkpoint."""
    experts = model.arch.experts
    none = ("optimizer", "lr_scheduler", "data_sampler", "random_ltd", "param_shapes", "frozen_param_shapes")
    return {
        **dict.fromkeys((*none, "frozen_param_fragments")),
        **({} if experts is None else {"num_experts": [experts.count] * len(experts.layers)}),
        "buffer_names": [],
        "shared_params": {},
        "sparse_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": model.iteration,
        "global_samples": int(model.progress.get("consumed_train_samples") or 0),
        "dp_world_size": 1,
        "mp_world_size": options.tp * options.pp,
        "ds_config": {},
        "ds_version": _VERSION,
    }


def _write_modules(path: Path, whole: Megatron, options: WriteOptions) -> None:
    """One file per pipeline module and tensor-parallel rank."""
    modules: dict[int, dict[str, str]] = {}
    for name in whole.tensors.records:
        module, _, inner = name.removeprefix("tied_modules.").partition(".")
        modules.setdefault(1 if module == "embed" else int(module), {})[inner] = name
    for number, slots in modules.items():
        paths = [path / f"layer_{number:02d}-model_{rank:02d}-model_states.pt" for rank in range(options.tp)]
        write_stage(paths, whole, slots, dict)


def _write_stages(path: Path, whole: Megatron, state: Mapping[str, Any], options: WriteOptions) -> None:
    """One file per stage and tensor-parallel rank, and one per expert of each."""
    for stage, layers in enumerate(even_stages(whole.num_layers, options.pp)):
        own: dict[str, str] = {}
        experts: dict[tuple[int, int], dict[str, str]] = {}
        for name in _stage_names(whole, layers):
            match = _EXPERT.fullmatch(name)
            (own if match is None else experts.setdefault((int(match[1]), int(match[2])), {}))[name] = name
        first = stage * options.tp
        numbers = [f"mp_rank_{first + rank:02d}_model_states.pt" for rank in range(options.tp)]
        write_stage([path / number for number in numbers], whole, own, lambda tree: {"module": tree, **state})
        flat = replace(whole, dialect=replace(whole.dialect, nested=()))
        order = sorted({layer for layer, _ in experts})
        for (layer, expert), slots in experts.items():
            stem = f"layer_{order.index(layer)}_expert_{expert}_"
            write_stage([path / f"{stem}{number}" for number in numbers], flat, slots, dict)


def _stage_names(whole: Megatron, layers: range) -> list[str]:
    """The full names of the tensors of a stage; a tied embedding is in the last one, too."""
    first, last = layers.start == 0, layers.stop == whole.num_layers

    def has(piece: Piece) -> bool:
        if isinstance(piece.place, int):
            return piece.place in layers
        return first if piece.place == "first" and not (last and piece.name.startswith(_TIED)) else last

    return [piece.full_name(whole.dialect) for piece in whole.table if has(piece)]
