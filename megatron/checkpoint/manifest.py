"""The manifest of a checkpoint: every file with its length and hash, every tensor with its logical shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron.checkpoint.errors import CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.files import FileRecord, Progress, nothing, record_of
from megatron.checkpoint.location import Location

FORMAT = "megatron checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
RUN = "run.json"
# Small, and a wrong byte in one of them is wrong without a sign: hashed at every load. The first is the index of
# the tensor files that torch.distributed.checkpoint writes.
ALWAYS_HASHED = (".metadata", PROGRESS, RUN)

Payload = Literal["tensors", "directory"]


@dataclass(frozen=True)
class TensorRecord:
    """Logical shape of a tensor, whatever the layout it was saved from, and its dtype without "torch."."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        payload: "tensors": readable in any layout; "directory": files that belong to whoever wrote them.
        iteration: training step after which it was written.
        torch: version of PyTorch that wrote it.
        files: by path relative to the checkpoint, all but the manifest itself.
        tensors: by name; empty for a directory.
    """

    payload: Payload
    iteration: int
    torch: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]

    def to_bytes(self) -> bytes:
        """The contents of manifest.json; its own hash is one of its entries."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "payload": self.payload,
            "iteration": self.iteration,
            "torch": self.torch,
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
            "tensors": {name: asdict(record) for name, record in self.tensors.items()},
        }
        return json.dumps({**body, "sha256": _hash_of(body)}, indent=1).encode()


def _hash_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Location) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CorruptCheckpoint: it is missing or not what was written.
        CheckpointMismatch: it was written by a newer version of this project.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CorruptCheckpoint(_why_no_manifest(folder)) from None
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _hash_of(content):
        raise CorruptCheckpoint(f"{path} has been altered: its own hash differs")
    if content["version"] > VERSION:
        raise CheckpointMismatch(
            f"{folder} has version {content['version']} of the checkpoint format, this installation reads up to "
            f"{VERSION}: update it"
        )
    return Manifest(
        payload=content["payload"],
        iteration=content["iteration"],
        torch=content["torch"],
        files={name: FileRecord(**record) for name, record in content["files"].items()},
        tensors={name: TensorRecord(tuple(r["shape"]), r["dtype"]) for name, r in content["tensors"].items()},
    )


def _why_no_manifest(folder: Location) -> str:
    if not folder.is_dir():
        return f"{folder} does not exist"
    return f"{folder} has no {MANIFEST}: it is incomplete, or a checkpoint of another program that must be converted"


def check_presence(folder: Location, manifest: Manifest) -> None:
    """Check that every file is there with its length, and the contents of the small ones.

    Raises:
        CorruptCheckpoint: naming each file at fault.
    """
    faults = []
    for name, record in manifest.files.items():
        try:
            length = (folder / name).stat().st_size
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
            continue
        if length != record.bytes:
            faults.append(f"{name}: {length} bytes instead of {record.bytes}")
        elif name in ALWAYS_HASHED:
            faults += content_faults(folder, {name: record})
    if faults:
        raise CorruptCheckpoint(f"{folder} is damaged: {'; '.join(faults)}")


def content_faults(folder: Location, files: Mapping[str, FileRecord], progress: Progress = nothing) -> list[str]:
    """Read files and describe each whose contents are not what was written; calls `progress` after each piece."""
    faults = []
    for name, record in files.items():
        try:
            found = record_of(folder / name, progress)
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
            continue
        if found != record:
            faults.append(f"{name}: contents have changed (SHA-256 {found.sha256[:12]}, not {record.sha256[:12]})")
    return faults
