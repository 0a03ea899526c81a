"""Checkpoints of this project."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron
from megatron.checkpoint.errors import CheckpointMismatch
from megatron.checkpoint.files import files_below, record_of
from megatron.checkpoint.folder import folder_of, latest, list_checkpoints
from megatron.checkpoint.formats.assets import FOLDER, assets_beside, read_json
from megatron.checkpoint.formats.dcp import Container, write_container
from megatron.checkpoint.formats.lazy import LazyTensors, cast_view
from megatron.checkpoint.formats.model import StoredModel, check, unpadded
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions, new_folder
from megatron.checkpoint.formats.settings import complete_record
from megatron.checkpoint.manifest import MANIFEST, PROGRESS, RUN, TensorRecord, check_presence, read_manifest
from megatron.checkpoint.publish import Draft, Retention, Written, publish
from megatron.checkpoint.ranks import Ranks
from megatron.config.architecture import Architecture, RopeScaling
from megatron.config.experts import Experts

_MODEL = "model."
_OPTIMIZER = "optimizer."
_STEP = "step"
_COUNTERS = (
    *("iteration", "consumed_train_samples", "consumed_train_tokens", "consumed_valid_samples"),
    *("skipped_iterations", "nan_iterations"),
)
# Where float16 training begins; other runs do not look at it.
_LOSS_SCALE = {
    "value": 2.0**16,
    "minimum": 1.0,
    "window": 1000,
    "hysteresis": 2,
    "clean_steps": 0,
    "overflows_left": 2,
}


def read(folder: Path, options: ReadOptions) -> StoredModel:
    """Open a checkpoint of this project: the folder of a run, or one checkpoint in it.

    Raises:
        CorruptCheckpoint: files are missing or damaged.
        CheckpointMismatch: it holds the files of an engine instead of tensors.
    """
    path = _checkpoint_in(folder, options.iteration)
    manifest = read_manifest(path)
    check_presence(path, manifest)
    if manifest.payload != "tensors":
        raise CheckpointMismatch(
            f"{path} holds files of DeepSpeed's own, as earlier versions wrote them with --deepspeed: such a version "
            "reads them"
        )
    run, progress = read_json(path / RUN), read_json(path / PROGRESS)
    container = Container(path).tensors()
    sections = _sections(container)
    steps = sections.pop(_OPTIMIZER + _STEP, None)
    moments = {name.removeprefix(_OPTIMIZER): tensors for name, tensors in sections.items() if name != _MODEL}
    model = StoredModel(
        arch=unpadded(architecture_of(run["architecture"])),
        weights=sections[_MODEL],
        moments=moments if options.optimizer else {},
        steps=None if steps is None else int(steps.read(next(iter(steps.records)))),
        assets=assets_beside(path.parent, run["settings"]),
        settings=run["settings"],
        progress=progress,
    )
    return check(model, path)


def _checkpoint_in(folder: Path, iteration: int | None) -> Path:
    if (folder / MANIFEST).is_file():
        return folder
    present = list_checkpoints(folder)
    wanted = latest(folder) if iteration is None else iteration
    if wanted is None or (iteration is not None and wanted not in present):
        known = ", ".join(map(str, present)) or "none"
        raise CheckpointMismatch(f"{folder} has no checkpoint of iteration {iteration}; there are: {known}")
    return present.get(wanted, folder_of(folder, wanted))


def _sections(container: LazyTensors) -> dict[str, LazyTensors]:
    """The tensors without the first part of their name, by that part: "model." or "optimizer.<entry>"."""
    names: dict[str, dict[str, str]] = {}
    for name in container.records:
        prefix = _MODEL if name.startswith(_MODEL) else ".".join(name.split(".")[:2])
        names.setdefault(prefix, {})[name.removeprefix(prefix).removeprefix(".")] = name
    return {prefix: _renamed(container, inner) for prefix, inner in names.items()}


def _renamed(tensors: LazyTensors, names: Mapping[str, str]) -> LazyTensors:
    return LazyTensors(
        {new: tensors.records[old] for new, old in names.items()}, lambda name: tensors.read(names[name])
    )


def architecture_of(saved: Mapping[str, Any]) -> Architecture:
    """The architecture in the record of a run."""
    scaling, experts = saved["rope_scaling"], saved.get("experts")
    parts = {
        "rope_scaling": None if scaling is None else RopeScaling(**scaling),
        "experts": None if experts is None else Experts(**{**experts, "layers": tuple(experts["layers"])}),
    }
    return Architecture(**{**saved, **parts})


def write(model: StoredModel, folder: Path, options: WriteOptions) -> None:
    """Write the folder of a run that holds one checkpoint, which any layout and engine can go on from.

    Weights keep their dtype unless `options.dtype` is given; a run makes float32 of them when it loads them.

    Raises:
        CheckpointError: the options of this project cannot describe the model, or `folder` is there already.
    """
    tensors = _sections_to_tensors(model, options)
    changes: dict[str, Any] = {}
    if model.assets.has_tokenizer():
        changes = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str((folder / FOLDER).absolute())}
    run = {
        "settings": complete_record(model.arch, model.settings, changes),
        "architecture": asdict(unpadded(model.arch)),
        "ops": [],
        "layout": {"world_size": 1, "tp": 1, "cp": 1, "pp": 1, "ep": 1},
        "versions": {
            "megatron": megatron.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    with new_folder(folder) as temporary:
        if model.assets.files:
            model.assets.copy_to(temporary / FOLDER)
        draft = Draft(
            root=temporary,
            iteration=model.iteration,
            payload="tensors",
            write=lambda path: _write_tensors(path, tensors),
            progress=_progress(model),
            run=run,
        )
        keep_all = Retention(keep_last=None, retain_interval=None)
        publish(draft, keep_all, verify=False, ranks=Ranks.of(None), log=lambda _: None)


def _sections_to_tensors(model: StoredModel, options: WriteOptions) -> LazyTensors:
    parts = {_MODEL: cast_view(model.weights, options.dtype)}
    parts |= {f"{_OPTIMIZER}{entry}.": tensors for entry, tensors in model.moments.items()}
    if model.moments:
        parts[f"{_OPTIMIZER}{_STEP}."] = _same_scalar(model.weights, float(model.steps or 0))
    places = {f"{prefix}{name}": (part, name) for prefix, part in parts.items() for name in part.records}

    def read_one(name: str) -> Tensor:
        part, inner = places[name]
        return part.read(inner)

    return LazyTensors({name: part.records[inner] for name, (part, inner) in places.items()}, read_one)


def _same_scalar(weights: LazyTensors, value: float) -> LazyTensors:
    record = TensorRecord((), "float32")
    return LazyTensors(dict.fromkeys(weights.records, record), lambda _: torch.tensor(value, dtype=torch.float32))


def _write_tensors(folder: Path, tensors: LazyTensors) -> Written:
    write_container(folder, tensors)
    return Written({name: record_of(folder / name) for name in files_below(folder)}, tensors.records)


def _progress(model: StoredModel) -> dict[str, Any]:
    """How far training was; a model that was not trained here is at the beginning."""
    counters = {name: int(model.progress.get(name) or 0) for name in _COUNTERS}
    schedule = model.progress.get("opt_param_scheduler") or {
        "num_steps": counters["consumed_train_samples"],
        "num_tokens": counters["consumed_train_tokens"],
    }
    scale = model.progress.get("loss_scale") or _LOSS_SCALE
    return {**counters, "opt_param_scheduler": schedule, "loss_scale": scale}
