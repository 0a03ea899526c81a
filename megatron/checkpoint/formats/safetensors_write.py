"""Safetensors files, written one tensor at a time.

The format: the length of a JSON header (8 bytes, little endian), the header with dtype, shape and place of every
tensor, then the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.formats.lazy import LazyTensors, dtype_of
from megatron.checkpoint.formats.torch_write import memory_of

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
_ALIGNMENT = 8


def write_safetensors(path: Path, tensors: LazyTensors, names: Sequence[str]) -> None:
    """Write some of the tensors to a new file and wait until it is on the disk.

    Raises:
        CheckpointError: a dtype that the format does not have.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        record = tensors.records[name]
        if record.dtype not in _DTYPES:
            raise CheckpointError(f"{name} is {record.dtype}, which safetensors files cannot hold")
        end = start + math.prod(record.shape) * dtype_of(record).itemsize
        header[name] = {"dtype": _DTYPES[record.dtype], "shape": list(record.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(memory_of(tensors.read(name)))
        if file.tell() != 8 + len(text) + start:
            raise AssertionError(f"{path}: a tensor is not as long as announced")
        file.flush()
        os.fsync(file.fileno())
