"""Folders of Hugging Face: safetensors or `.bin` files, whole or in shards with an index.

Tensors are read one at a time from mapped files. Writing needs memory for one tensor and the parts it is made of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.files import write_synced
from megatron.checkpoint.formats.assets import CONFIG, assets_in, read_json
from megatron.checkpoint.formats.lazy import (
    LazyTensors,
    cast_view,
    dtype_of,
    join_view,
    record_of,
    split_view,
    stack_view,
    unstack_view,
)
from megatron.checkpoint.formats.model import StoredModel, check, unpadded
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions, new_folder
from megatron.checkpoint.formats.safetensors_write import write_safetensors
from megatron.checkpoint.formats.torch_read import flatten, load_torch
from megatron.checkpoint.manifest import TensorRecord
from megatron.config.architecture import Architecture
from megatron.model.hf import entries, is_fused, stacks, stored_names
from megatron.model.hf_config import architecture_from_hf_config, hf_config

_STEMS = ("model.safetensors", "pytorch_model.bin")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}


def read(folder: Path, options: ReadOptions) -> StoredModel:
    """Open a folder.

    Raises:
        CheckpointError: the model is of no supported family.
        CorruptCheckpoint: files are missing or damaged.
    """
    assets = assets_in(folder)
    config = read_json(options.config or folder / CONFIG)
    arch = architecture_in(config, folder)
    weights = from_state_dict(_open(folder), arch, folder)
    return check(StoredModel(arch=arch, weights=weights, assets=assets), folder)


def from_state_dict(stored: LazyTensors, arch: Architecture, where: Path) -> LazyTensors:
    """Logical tensors out of those of a model of transformers.

    Args:
        stored: may lack the leading "transformer." in their names.
        arch: of the model.
        where: the checkpoint, for messages.

    Raises:
        CheckpointMismatch: tensors are missing or left over.
    """
    try:
        names = stored_names(stored.records, arch)
    except ValueError as error:
        raise CheckpointMismatch(f"{where}: {error}") from error
    theirs = LazyTensors(
        {full: stored.records[name] for full, name in names.items()}, lambda full: stored.read(names[full])
    )
    fused = is_fused(names)
    weights = split_view(theirs, entries(arch, fused=fused))
    return weights if fused else stack_view(weights, stacks(arch))


def to_state_dict(weights: LazyTensors, arch: Architecture) -> LazyTensors:
    """The tensors of a model of transformers, as in its files, out of logical ones.

    Raises:
        CheckpointError: no supported family computes this architecture.
    """
    try:
        table = entries(arch)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return join_view(unstack_view(weights, stacks(arch)), table)


def architecture_in(config: Mapping[str, Any], where: Path) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        CheckpointError: a family or a setting that is not supported.
    """
    try:
        return architecture_from_hf_config(config)
    except KeyError as error:
        raise CheckpointError(f"{where}: {CONFIG} has no {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _weight_file(folder: Path) -> Path | None:
    """The file with the weights or the index of several; safetensors are preferred."""
    for stem in _STEMS:
        for name in (f"{stem}.index.json", stem):
            if (folder / name).is_file():
                return folder / name
    return None


def _open(folder: Path) -> LazyTensors:
    path = _weight_file(folder)
    if path is None:
        raise CorruptCheckpoint(
            f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index (*.index.json)"
        )
    if path.suffix != ".json":
        return _open_files([path])
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CorruptCheckpoint(f"{path} has no weight_map")
    files = sorted(set(weight_map.values()))
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise CorruptCheckpoint(f"{folder}: {len(absent)} of {len(files)} shards are missing: {', '.join(absent[:8])}")
    tensors = _open_files([folder / name for name in files])
    if unknown := sorted(weight_map.keys() - tensors.records.keys()):
        raise CorruptCheckpoint(f"{folder}: the shards lack tensors that {path.name} lists: {', '.join(unknown[:5])}")
    return tensors


def _open_files(paths: Sequence[Path]) -> LazyTensors:
    if paths[0].suffix != ".safetensors":
        return _open_bins(paths)
    files = [_open_safetensors(path) for path in paths]
    places = {name: file for file in files for name in file.records}
    return LazyTensors(
        {name: file.records[name] for name, file in places.items()}, lambda name: places[name].read(name)
    )


def _open_safetensors(path: Path) -> LazyTensors:
    try:
        file: Any = safe_open(path, framework="pt")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        records = {name: TensorRecord(tuple(p.get_shape()), _DTYPES[p.get_dtype()]) for name, p in parts.items()}
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} holds tensors of dtype {error}, which is not supported") from error
    return LazyTensors(records, file.get_tensor)


def _open_bins(paths: Iterable[Path]) -> LazyTensors:
    """Old files cannot be mapped, so no more than one is open at a time."""
    places: dict[str, Path] = {}
    records: dict[str, TensorRecord] = {}
    for path in paths:
        found = {name: record_of(tensor) for name, tensor in flatten(load_torch(path)).items()}
        records.update(found)
        places.update(dict.fromkeys(found, path))
    latest: dict[Path, dict[str, Tensor]] = {}

    def read_one(name: str) -> Tensor:
        path = places[name]
        if path not in latest:
            latest.clear()
            latest[path] = flatten(load_torch(path))
        return latest[path][name]

    return LazyTensors(records, read_one)


def write(model: StoredModel, folder: Path, options: WriteOptions) -> None:
    """Write a folder that transformers reads, with the configuration and the tokenizer that were carried along.

    Raises:
        CheckpointError: no supported family computes this architecture, or `folder` is there already.
    """
    arch = unpadded(model.arch)
    tensors = cast_view(to_state_dict(model.weights, arch), options.dtype)
    with new_folder(folder) as temporary:
        model.assets.copy_to(temporary)
        config = _config(model, arch, next(iter(tensors.records.values())).dtype)
        if config is not None:
            write_synced(temporary / CONFIG, json.dumps(config, indent=2).encode())
        shards = _shards(tensors, options.max_shard_bytes)
        names = [_file_name(index, len(shards)) for index in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(temporary / name, tensors, shard)
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": tensors.bytes}, "weight_map": weight_map}
            write_synced(temporary / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def _config(model: StoredModel, arch: Architecture, dtype: str) -> dict[str, Any] | None:
    """The configuration to write; None if the carried one is right as it is."""
    carried = model.assets.config()
    ours = hf_config(arch)
    if carried is None or carried.get("model_type") != ours["model_type"]:
        special = {name: value for name, value in (carried or {}).items() if name.endswith("_token_id")}
        return {**ours, **special, "torch_dtype": dtype}
    before = hf_config(architecture_in(carried, model.assets.files[CONFIG]))
    changed = {name: value for name, value in ours.items() if before[name] != value}
    key = "dtype" if "dtype" in carried else "torch_dtype"
    if not changed and carried.get(key) == dtype:
        return None
    if changed.keys() & {"rope_theta", "rope_scaling"}:
        carried.pop("rope_parameters", None)  # it says the same in the words of transformers 5
    return {**carried, **changed, key: dtype}


def _shards(tensors: LazyTensors, largest: int) -> list[list[str]]:
    """The names of the tensors, in their order, in groups of at most so many bytes (or of one tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, record in tensors.records.items():
        length = math.prod(record.shape) * dtype_of(record).itemsize
        if groups[-1] and size + length > largest:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += length
    return groups


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
