"""Checking a checkpoint without a model: files, completeness of the tensors, values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron.checkpoint.location import Location
from megatron.checkpoint.manifest import Manifest, TensorRecord, check_presence, content_faults
from megatron.checkpoint.tensors import read_index, stored_tensors, stream_tensors


@dataclass(frozen=True)
class TensorReport:
    """What a tensor holds: how many elements are NaN or infinite, and the largest absolute value of the others."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nan: int
    inf: int
    largest: float


def file_faults(folder: Location, manifest: Manifest) -> list[str]:
    """Describe each file whose contents are not what was written.

    Raises:
        CorruptCheckpoint: files are missing or have another length.
    """
    check_presence(folder, manifest)
    return content_faults(folder, manifest.files)


def index_faults(folder: Location, manifest: Manifest) -> list[str]:
    """Describe each tensor that the index of the tensor files and the manifest disagree on, or that has gaps."""
    index = read_index(folder)
    found = {name: TensorRecord(shape, dtype) for name, shape, dtype in stored_tensors(index)}
    faults = [f"{name}: not in the manifest" for name in found if name not in manifest.tensors]
    faults += [
        f"{name}: {record} in the manifest, {found[name]} in the tensor files"
        for name, record in manifest.tensors.items()
        if name in found and found[name] != record
    ]
    return faults + gaps(index, manifest.tensors)


def gaps(index: Metadata, names: Iterable[str]) -> list[str]:
    """Describe each tensor of which the files do not hold every element, according to their index."""
    entries = {n: e for n, e in index.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    faults = [f"{name}: not in the tensor files" for name in names if name not in entries]
    for name, entry in entries.items():
        stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if stored != math.prod(entry.size):
            faults.append(f"{name}: {stored} of {math.prod(entry.size)} elements are stored")
    return faults


def tensor_reports(folder: Location) -> Generator[TensorReport]:
    """Look at every tensor, one at a time; memory for one whole tensor and its mask is needed."""
    for name, tensor in stream_tensors(folder):
        yield _report(name, tensor)


def _report(name: str, tensor: Tensor) -> TensorReport:
    dtype = str(tensor.dtype).removeprefix("torch.")
    # 8-bit floats know no isnan.
    values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    nan = int(torch.isnan(values).sum())
    inf = int(torch.isinf(values).sum())
    finite = values[torch.isfinite(values)] if nan or inf else values
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return TensorReport(name, tuple(tensor.shape), dtype, nan, inf, largest)
