"""Megatron-Core's "torch_dist" checkpoints, which any of its layouts loads.

    latest_checkpointed_iteration.txt             "100" or "release"
    iter_0000100/
      .metadata, __R_W.distcp                     a container of torch.distributed.checkpoint
      common.pt                                   arguments and counters; newer versions keep them in the container
      metadata.json                               which kind of container it is

The tensors of all layers with the same role are one tensor with a new first axis (decoder.layers.mlp.linear_fc1.weight
[layers, rows, columns]). Norms have the names that Transformer Engine gives them, whichever layers are used.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.errors import CorruptCheckpoint
from megatron.checkpoint.files import write_synced
from megatron.checkpoint.folder import TRACKER
from megatron.checkpoint.formats.assets import FOLDER, assets_beside
from megatron.checkpoint.formats.dcp import Container, write_container
from megatron.checkpoint.formats.lazy import LazyTensors
from megatron.checkpoint.formats.megatron import client_state, progress_in, record_in, tracked
from megatron.checkpoint.formats.merge import Megatron, logical_weights, to_dialect
from megatron.checkpoint.formats.model import StoredModel, check
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions, described_architecture, new_folder
from megatron.checkpoint.formats.torch_read import load_torch
from megatron.checkpoint.formats.torch_write import TorchFile
from megatron.checkpoint.manifest import TensorRecord
from megatron.config.architecture import Architecture

_INDEX = ".metadata"
_COMMON = "common.pt"
_COMMON_IN_CONTAINER = "common_state"
_LAYERS = "decoder.layers."
_OPTIMIZER = re.compile(r"optimizer\.(?:state\.)?(exp_avg|exp_avg_sq|param|fp32_param)\.(.+)")
_WEIGHTS = ("param", "fp32_param")
_DIALECT = "core-te-stacked"
_KIND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_KIND = {"common_backend": "torch", "common_backend_version": 1}
# The linear layers of Megatron-Core (but not experts) keep a state of Transformer Engine, which is empty without FP8.
_WITH_EXTRA_STATE = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def read(folder: Path, options: ReadOptions) -> StoredModel:
    """Open a checkpoint: the folder of a run, or one checkpoint in it.

    With `options.optimizer` and an optimizer's state the weights are its float32 ones, else those of the model.

    Raises:
        CorruptCheckpoint: files are missing or damaged.
        CheckpointError: it does not fit its configuration, or does not describe the model.
    """
    path = _checkpoint_in(folder, options.iteration)
    container = Container(path)
    common = _common(path, container)
    record = record_in(common)
    assets = assets_beside(path.parent, record)
    arch = described_architecture(options, assets, record, path)
    stored = container.tensors()
    optimizer = _optimizer_names(stored) if options.optimizer else {}
    parts = {entry: _layered(container, names, arch) for entry, names in optimizer.items()}
    own = {name: name for name in stored.records if not name.startswith("optimizer.")}
    weights = next((parts[entry] for entry in _WEIGHTS if entry in parts), _layered(container, own, arch))
    model = StoredModel(
        arch=arch,
        weights=logical_weights([weights], arch, options, path),
        moments={
            entry: logical_weights([tensors], arch, options, path)
            for entry, tensors in parts.items()
            if entry not in _WEIGHTS
        },
        assets=assets,
        settings=record,
        progress=progress_in(common, record),
    )
    return check(model, path)


def _checkpoint_in(folder: Path, iteration: int | None) -> Path:
    if (folder / _INDEX).is_file():
        return folder
    name = tracked(folder, TRACKER) if iteration is None else str(iteration)
    path = folder / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    if not (path / _INDEX).is_file():
        raise CorruptCheckpoint(f"{path} has no {_INDEX}: it is incomplete, or no torch_dist checkpoint")
    return path


def _common(path: Path, container: Container) -> dict[str, Any]:
    """What is no tensor: arguments and counters."""
    if (path / _COMMON).is_file():
        found = load_torch(path / _COMMON)
    else:
        names = [name for name in container.object_names() if name.split("/")[0] == _COMMON_IN_CONTAINER]
        found = load_torch(io.BytesIO(container.read_bytes(names[0]))) if names else {}
    found = found[0] if isinstance(found, list) else found
    return dict(found) if isinstance(found, Mapping) else {}


def _optimizer_names(stored: LazyTensors) -> dict[str, dict[str, str]]:
    """Entry of the optimizer -> name of the parameter -> name of the tensor."""
    found: dict[str, dict[str, str]] = {}
    for name in stored.records:
        if match := _OPTIMIZER.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = name
    return found


def _layered(container: Container, names: Mapping[str, str], arch: Architecture) -> LazyTensors:
    """The tensors of the layers apart, under names with the number of the layer.

    Args:
        container: where they are.
        names: name of the parameter -> name in the container.
        arch: of the model.
    """
    stored = container.tensors().records
    places: dict[str, tuple[str, int | None]] = {}
    for name, there in names.items():
        rest = name.removeprefix(_LAYERS)
        if name.startswith(_LAYERS) and not rest.split(".")[0].isdecimal():
            places |= {f"{_LAYERS}{layer}.{rest}": (there, layer) for layer in range(arch.num_layers)}
        else:
            places[name] = (there, None)

    def read_one(name: str) -> Tensor:
        there, layer = places[name]
        return container.read(there, layer)

    records = {
        name: stored[there] if layer is None else TensorRecord(stored[there].shape[1:], stored[there].dtype)
        for name, (there, layer) in places.items()
    }
    return LazyTensors(records, read_one)


def write(model: StoredModel, folder: Path, options: WriteOptions) -> None:
    """Write weights, arguments and counters; a model without iterations is a "release".

    Raises:
        CheckpointError: Megatron-Core has no place for a tensor, or `folder` is there already.
    """
    whole = to_dialect(model, options.dialect or _DIALECT, options)
    name = f"iter_{model.iteration:07d}" if model.iteration else "release"
    alike = model.arch.expert_layers in (0, model.arch.num_layers)
    with new_folder(folder) as temporary:
        path = temporary / name
        path.mkdir()
        stacks = _stacks(whole) if alike else {}  # layers of two kinds are stored one by one
        write_container(path, whole.tensors, stacks=stacks, objects=_extra_state(whole, stacks))
        with TorchFile(path / _COMMON, client_state(model, whole, options)):
            pass
        write_synced(path / "metadata.json", json.dumps({**_KIND, **_COMMON_KIND}).encode())
        if model.assets.files:
            model.assets.copy_to(temporary / FOLDER)
        write_synced(temporary / TRACKER, (str(model.iteration) if model.iteration else "release").encode())


def _extra_state(whole: Megatron, stacks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Empty states of the linear layers: by layer in their name, or by part of the state of all of them."""
    if not stacks:
        modules = (name.removesuffix(".weight") for name in whole.tensors.records)
        return {f"{name}._extra_state": [None] for name in modules if name.endswith(_WITH_EXTRA_STATE)}
    return {
        f"{_LAYERS}{part}._extra_state/shard_{layer}_{len(names)}": [None]
        for part in _WITH_EXTRA_STATE
        if (names := stacks.get(f"{_LAYERS}{part}.weight"))
        for layer in range(len(names))
    }


def _stacks(whole: Megatron) -> dict[str, list[str]]:
    """Name of the tensor of all layers -> those of each layer, in their order."""
    stacks: dict[str, list[str]] = {}
    for piece in whole.table:
        if isinstance(piece.place, int):
            stacks.setdefault(_LAYERS + piece.name, []).append(piece.full_name(whole.dialect))
    return stacks
