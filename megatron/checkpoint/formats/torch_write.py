"""Files that `torch.load` reads, written one tensor at a time.

`torch.save` wants all tensors of a file in memory at once. The format itself does not: it is an uncompressed zip
archive with a pickle that describes the objects (`data.pkl`) and one member per tensor (`data/0`, `data/1`, ...).
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.formats.lazy import dtype_of
from megatron.checkpoint.manifest import TensorRecord

_ALIGNMENT = 64  # of tensors in the file, so that they can be used where they are mapped
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name
_ZIP64_FIELD = 20  # bytes that zipfile adds to a member's extra field when sizes may exceed 4 GiB
_FIELD_HEADER = struct.Struct("<2sH")
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class Slot:
    """Where a tensor belongs in the objects of a file; its data follows later."""

    def __init__(self, name: str, record: TensorRecord) -> None:
        self.name = name
        self.record = record

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        shape = self.record.shape
        stride = tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
        storage = _Storage(self.name, self.record)
        return (torch._utils._rebuild_tensor_v2, (storage, 0, shape, stride, False, collections.OrderedDict()))


class _Storage:
    def __init__(self, name: str, record: TensorRecord) -> None:
        self.name = name
        self.record = record


class _Pickler(pickle.Pickler):
    """Notes which number each tensor gets."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.numbers: dict[str, int] = {}
        self.records: dict[str, TensorRecord] = {}

    def persistent_id(self, obj: Any) -> Any:
        """The way of torch to describe the data of a tensor."""
        if not isinstance(obj, _Storage):
            return None
        dtype = dtype_of(obj.record)
        if dtype not in _STORAGES:
            raise ValueError(f"{obj.name}: {obj.record.dtype} cannot be stored in a file of torch")
        number = self.numbers.setdefault(obj.name, len(self.numbers))
        self.records[obj.name] = obj.record
        return ("storage", _STORAGES[dtype], str(number), "cpu", math.prod(obj.record.shape))


class TorchFile:
    """A file of `torch.save` being written. Use as a context; when it ends, all tensors must have been written.

    Args:
        path: of the file, which must not exist.
        objects: what `torch.load` will return, with a `Slot` wherever there is a tensor.
    """

    def __init__(self, path: Path, objects: Any) -> None:
        self._path = path
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(objects)
        self._missing = pickler.numbers
        self._records = pickler.records
        self._file = path.open("xb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._add("data.pkl", buffer.getbuffer())
        self._add("byteorder", sys.byteorder.encode())
        self._add("version", b"3\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the data of the slot of that name.

        Raises:
            ValueError: the tensor is not what the slot says, or there is no such slot left.
        """
        if name not in self._missing:
            raise ValueError(f"{self._path}: {name} has no place, or was written before")
        record = self._records[name]
        if tuple(tensor.shape) != record.shape or tensor.dtype != dtype_of(record):
            raise ValueError(f"{self._path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {record}")
        self._add(f"data/{self._missing.pop(name)}", memory_of(tensor))

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None and self._missing:
                raise ValueError(f"{self._path}: no data for {', '.join(sorted(self._missing)[:5])}")
            if kind is None:
                self._zip.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _add(self, name: str, data: bytes | memoryview) -> None:
        """Add a member whose data begins at a multiple of the alignment."""
        info = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
        used = self._file.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_FIELD + _FIELD_HEADER.size
        padding = -used % _ALIGNMENT
        info.extra = _FIELD_HEADER.pack(b"FB", padding) + bytes(padding)
        with self._zip.open(info, "w", force_zip64=True) as member:
            member.write(data)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
