"""Universal checkpoints of DeepSpeed: whole parameters and moments, which DeepSpeed cuts for any layout.

latest_universal                              "global_step100_universal"
global_step100_universal/
  zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt
  zero/optimizer_state.pt
  mp_rank_XX_model_states.pt                  arguments and counters
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CorruptCheckpoint
from megatron.checkpoint.files import write_synced
from megatron.checkpoint.folder import TRACKER
from megatron.checkpoint.formats.assets import FOLDER, assets_beside
from megatron.checkpoint.formats.deepspeed import engine_state
from megatron.checkpoint.formats.lazy import LazyTensors, cast_view, record_of, rows_view
from megatron.checkpoint.formats.megatron import client_state, progress_in, record_in, tracked
from megatron.checkpoint.formats.merge import Megatron, logical_weights, to_dialect
from megatron.checkpoint.formats.model import StoredModel, check
from megatron.checkpoint.formats.names import PIPELINE, Piece
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions, described_architecture, new_folder
from megatron.checkpoint.formats.torch_read import load_torch
from megatron.checkpoint.formats.torch_write import Slot, TorchFile
from megatron.checkpoint.formats.zero import ENTRIES, WEIGHTS

_LATEST = "latest_universal"
_ZERO = "zero"
_STATE = "optimizer_state.pt"
_VERSION = 0.2
# A run takes as many of these as its optimizer has groups; they leave its settings as they are.
_PARAMETER_GROUPS = 16


def read(folder: Path, options: ReadOptions) -> StoredModel:
    """Open a checkpoint: the folder of a run, or one checkpoint in it.

    Raises:
        CorruptCheckpoint: files are missing or damaged.
        CheckpointError: it does not fit its configuration, or does not describe the model.
    """
    path = _checkpoint_in(folder, options.iteration)
    states = sorted(path.glob("*mp_rank_*_model_states.pt"))
    if not states:
        raise CorruptCheckpoint(f"{path} has no mp_rank_00_model_states.pt")
    state = load_torch(states[0])
    record = record_in(state)
    assets = assets_beside(path.parent, record)
    arch = described_architecture(options, assets, record, path)
    entries = {entry: _entry(path, entry) for entry in (ENTRIES if options.optimizer else (WEIGHTS,))}
    moments = {
        entry: logical_weights([tensors], arch, options, path)
        for entry, tensors in entries.items()
        if entry != WEIGHTS and tensors.records
    }
    model = StoredModel(
        arch=arch,
        weights=logical_weights([entries[WEIGHTS]], arch, options, path),
        moments=moments,
        steps=_steps(path) if moments else None,
        assets=assets,
        settings=record,
        progress=progress_in(state, record),
    )
    return check(model, path)


def _checkpoint_in(folder: Path, iteration: int | None) -> Path:
    if (folder / _ZERO).is_dir():
        return folder
    path = folder / (tracked(folder, _LATEST) if iteration is None else f"global_step{iteration}_universal")
    if not (path / _ZERO).is_dir():
        raise CorruptCheckpoint(f"{path} has no folder {_ZERO}")
    return path


def _entry(path: Path, entry: str) -> LazyTensors:
    """The weights or one of the moments, by DeepSpeed's parameter names."""
    files = {child.name: child / f"{entry}.pt" for child in (path / _ZERO).iterdir() if child.is_dir()}
    tensors = {name: _param(file) for name, file in sorted(files.items()) if file.is_file()}
    return LazyTensors({name: record_of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__)


def _param(file: Path) -> Tensor:
    content = load_torch(file)
    tensor = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(tensor, Tensor):
        raise CorruptCheckpoint(f"{file} holds no tensor")
    return tensor.detach()


def _steps(path: Path) -> int | None:
    files = sorted((path / _ZERO).glob("*/step.pt"))
    return int(load_torch(files[0])) if files else None


def write(model: StoredModel, folder: Path, options: WriteOptions) -> None:
    """Write whole parameters in float32, and moments if there are any.

    The dialect is that of the run that will load it: "pipeline", or "megatron" for --no-pipeline-parallel, which every
    run with experts is. DeepSpeed looks for an expert under the number it has on its rank: such a run can have any
    number of data-parallel ranks, but each must have all experts (expert-parallel size 1).

    Raises:
        CheckpointError: the dialect has no place for a tensor, or `folder` is there already.
    """
    dialect = options.dialect or (PIPELINE if model.arch.experts is None else "megatron")
    if model.arch.experts is not None:
        options.log("WARNING: DeepSpeed loads experts from the universal form with expert-parallel size 1 only")
    tag = f"global_step{model.iteration}_universal"
    sources = {WEIGHTS: cast_view(model.weights, torch.float32), **model.moments}
    whole = {entry: to_dialect(model, dialect, options, weights) for entry, weights in sources.items()}
    info = universal_info(model, whole[WEIGHTS], options)
    with new_folder(folder) as temporary:
        path = temporary / tag
        (path / _ZERO).mkdir(parents=True)
        for entry, megatron in whole.items():
            _write_entry(path / _ZERO, entry, megatron, model.arch.vocab_size)
        if model.moments:
            for name in whole[WEIGHTS].tensors.records:
                _write_steps(path / _ZERO / name / "step.pt", torch.tensor(float(model.steps or 0)))
        groups: list[dict[str, Any]] = [{} for _ in range(_PARAMETER_GROUPS)]
        state = {**client_state(model, whole[WEIGHTS], options), **engine_state(model, options)}
        _write_objects(path / _ZERO / _STATE, {"param_groups": groups, "ds_version": state["ds_version"]})
        for rank in range(options.tp * options.pp):
            objects = {"module": None, **state, "universal_checkpoint_info": info}
            _write_objects(path / f"mp_rank_{rank:02d}_model_states.pt", objects)
        if model.assets.files:
            model.assets.copy_to(temporary / FOLDER)
        write_synced(temporary / TRACKER, str(model.iteration).encode())
        write_synced(temporary / _LATEST, tag.encode())


def _write_objects(path: Path, objects: Any) -> None:
    with TorchFile(path, objects):
        pass


def _write_steps(path: Path, steps: Tensor) -> None:
    with TorchFile(path, Slot("step", record_of(steps))) as file:
        file.write("step", steps)


def _write_entry(path: Path, entry: str, whole: Megatron, vocab_size: int) -> None:
    """One file per parameter: the whole tensor and how DeepSpeed is to cut it."""
    padded = {piece.full_name(whole.dialect): vocab_size for piece in whole.table if piece.has_vocabulary_rows}
    tensors = rows_view(whole.tensors, padded)
    for piece in whole.table:
        if not piece.ours:
            continue
        name = piece.full_name(whole.dialect)
        (path / name).mkdir(exist_ok=True)
        objects = {"param": Slot(name, tensors.records[name]), **_cutting(piece)}
        with TorchFile(path / name / f"{entry}.pt", objects) as file:
            file.write(name, tensors.read(name))


def _cutting(piece: Piece) -> dict[str, Any]:
    cutting: dict[str, Any] = {} if piece.split is None else {"cat_dim": piece.split.dim}
    if piece.split is not None and piece.split.blocks > 1:
        cutting["param_n_sub_params"] = piece.split.blocks
    return {**cutting, "vocab_tensor": True} if piece.has_vocabulary_rows else cutting


def universal_info(model: StoredModel, whole: Megatron, options: WriteOptions) -> dict[str, Any]:
    """What Megatron-DeepSpeed notes about the parameters: regular expressions of the names of each kind."""

    def patterns(select: Any) -> list[str]:
        names = [piece.full_name(whole.dialect) for piece in whole.table if piece.ours and select(piece)]
        return sorted({re.sub(r"\d+", r"\\d+", name) for name in names})

    return {
        "universal_checkpoint_version": _VERSION,
        "original_vocab_size": model.arch.vocab_size,
        "padded_vocab_size": whole.padded_vocab_size,
        "vocabulary_parameter_patterns": patterns(lambda piece: piece.has_vocabulary_rows),
        "pipeline_replicated_parameter_patterns": patterns(lambda piece: piece.name.startswith("tied_modules.")),
        "tp_replicated_parameter_patterns": patterns(lambda piece: piece.split is None),
        "parameter_with_row_parallelism_patterns": patterns(
            lambda piece: piece.split is not None and piece.split.dim == 1
        ),
        "parameter_with_2_sub_params_cat_dim_0": patterns(
            lambda piece: piece.split is not None and piece.split.blocks > 1
        ),
    }
