"""Formats of checkpoints: what other programs write, read here, and the other way round.

Every format is a file with `read(folder, options) -> StoredModel` and `write(model, folder, options)`. A `StoredModel`
is not loaded: its tensors are read while they are written in the other format, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch
from megatron.checkpoint.formats import deepspeed, huggingface, megatron, native, nxd, torch_dist, universal
from megatron.checkpoint.formats.assets import with_tokenizer
from megatron.checkpoint.formats.detect import describe, kind_of
from megatron.checkpoint.formats.model import StoredModel
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions

__all__ = ["FORMATS", "Format", "ReadOptions", "StoredModel", "WriteOptions", "convert", "open_model", "summary"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of checkpoint.

    Attributes:
        title: for messages.
        read, write: see the top of this file.
        sharded: whether it is split for a number of tensor- and pipeline-parallel ranks.
        moments: whether the optimizer's moments are written too; else weights alone.
    """

    title: str
    read: Callable[[Path, ReadOptions], StoredModel]
    write: Callable[[StoredModel, Path, WriteOptions], None]
    sharded: bool
    moments: bool


FORMATS: Mapping[str, Format] = {
    "hf": Format(title="Hugging Face", read=huggingface.read, write=huggingface.write, sharded=False, moments=False),
    "native": Format(title="this project's", read=native.read, write=native.write, sharded=False, moments=True),
    "megatron": Format(title="Megatron", read=megatron.read, write=megatron.write, sharded=True, moments=False),
    "deepspeed": Format(title="DeepSpeed", read=deepspeed.read, write=deepspeed.write, sharded=True, moments=False),
    "universal": Format(title="universal", read=universal.read, write=universal.write, sharded=True, moments=True),
    "torch_dist": Format(
        title="Megatron-Core", read=torch_dist.read, write=torch_dist.write, sharded=False, moments=False
    ),
    "nxd": Format(title="NeuronX Distributed", read=nxd.read, write=nxd.write, sharded=True, moments=False),
}


def open_model(folder: Path, kind: str | None, options: ReadOptions) -> StoredModel:
    """Open a checkpoint.

    Args:
        folder: where it is.
        kind: a key of `FORMATS`; None: what the folder looks like.
        options: how.

    Raises:
        CheckpointError: it cannot be read; CheckpointMismatch if the folder is of another kind.
    """
    if not folder.exists():
        raise CheckpointMismatch(f"--load {folder}: it does not exist")
    found = kind_of(folder)
    if kind is not None and found is not None and found != kind:
        raise CheckpointMismatch(f"--load {folder}: {describe(folder)}; use --from {found} instead of --from {kind}")
    chosen = kind or found
    if chosen is None:
        raise CheckpointMismatch(f"--load {folder}: {describe(folder)}; say with --from what it is")
    model = FORMATS[chosen].read(folder, options)
    return replace(model, assets=with_tokenizer(model.assets, options.tokenizer))


def convert(model: StoredModel, kind: str, folder: Path, options: WriteOptions) -> None:
    """Write an open model in another format.

    Raises:
        CheckpointError: the format cannot hold the model, or the folder is there already.
    """
    chosen = FORMATS[kind]
    if not chosen.sharded and (options.tp, options.pp) != (1, 1):
        raise CheckpointError(
            f"--target-tensor-parallel-size {options.tp} --target-pipeline-parallel-size {options.pp}: a checkpoint in "
            f"the format {kind} is not split for a layout; leave them out"
        )
    if model.moments and not chosen.moments:
        options.log(f"WARNING: the format {kind} is written without the state of the optimizer")
    chosen.write(model, folder, options)


def summary(model: StoredModel, folder: Path, seconds: float) -> str:
    """What was converted, and how fast, in one line."""
    size = (model.weights.bytes + sum(tensors.bytes for tensors in model.moments.values())) / 1e6
    parameters = model.arch.num_parameters()
    return f"{folder}: {parameters:,} parameters, {size:,.1f} MB in {seconds:.1f} s ({size / seconds:,.0f} MB/s)"
