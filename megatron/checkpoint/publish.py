"""Publishing a checkpoint: all of it appears at once, or nothing does.

Everything is written under a temporary name and synced; then come the manifest, the rename and, last, the tracker.
A process that is killed at any point leaves the checkpoints that were there, and at most files under hidden names that
the next save removes. The temporary folder is in the same folder as the checkpoints, because only there is a rename
atomic.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint import folder
from megatron.checkpoint.errors import CheckpointError, CorruptCheckpoint, SaveError
from megatron.checkpoint.files import FileRecord, drop_from_cache, files_below, sync_folder, write_synced
from megatron.checkpoint.location import Location, RemotePath, location
from megatron.checkpoint.manifest import (
    MANIFEST,
    PROGRESS,
    RUN,
    Manifest,
    Payload,
    TensorRecord,
    content_faults,
)
from megatron.checkpoint.ranks import Ranks, RanksFailed

Log = Callable[[str], None]

# A network file system may show a new folder to other machines a little later.
_SECONDS_TO_APPEAR = 10.0
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Written:
    """What one rank has written and synced, by path relative to the checkpoint, and the tensors in it."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A checkpoint to be published.

    Attributes:
        root: the folder that holds the checkpoints.
        iteration: training step after which it is written.
        payload: what `write` writes.
        write: fills the temporary folder; called by all ranks, it returns on all or raises on all.
        progress, run: as in `TrainingState`.
    """

    root: Location
    iteration: int
    payload: Payload
    write: Callable[[Location], Written]
    progress: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def final(self) -> Location:
        """Where it will be found."""
        return folder.folder_of(self.root, self.iteration)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which older checkpoints stay; see `folder.obsolete`."""

    keep_last: int | None
    retain_interval: int | None


def publish(draft: Draft, retention: Retention, *, verify: bool, ranks: Ranks, log: Log) -> Location:
    """Write a checkpoint and make it the one to resume from. Called by all ranks.

    Args:
        draft: what to write.
        retention: which older ones to delete afterwards.
        verify: read every file back from the disk, and compare, before the checkpoint counts as written.
        ranks: who writes.
        log: called on the first rank.

    Raises:
        SaveError: on all ranks, if anything failed on any.
    """
    say = log if ranks.is_first else _say_nothing
    say(f"saving checkpoint at iteration {draft.iteration:7d} to {draft.root}")
    try:
        temporary = ranks.first(lambda: _begin(draft, retention))
        _write(draft, temporary, verify, ranks)
    except (RanksFailed, CheckpointError) as error:
        message = f"cannot save the checkpoint of iteration {draft.iteration} in {draft.root}: {error}"
        raise SaveError(f"{message}. {_advice(error)}. {_abandon(draft.root, ranks)}") from error
    say(f"  successfully saved checkpoint at iteration {draft.iteration:7d} to {draft.root}")
    if ranks.is_first:
        _delete_obsolete(draft, retention, log)
    return draft.final


def _say_nothing(_: str) -> None:
    pass


def _begin(draft: Draft, retention: Retention) -> Location:
    """First rank: everything that can be wrong before a byte is written; then the folder to write to."""
    folder.obsolete([], 0, keep_last=retention.keep_last, retain_interval=retention.retain_interval)
    _documents(draft)
    draft.root.mkdir(parents=True, exist_ok=True)
    folder.tidy(draft.root)
    if draft.final.exists() and draft.iteration not in folder.list_checkpoints(draft.root):
        raise SaveError(f"{draft.final} is there already and is not a checkpoint of this format, so it is not replaced")
    return folder.begin(draft.root, draft.iteration)


def _documents(draft: Draft) -> dict[str, bytes]:
    return {
        PROGRESS: json.dumps(draft.progress, indent=1).encode(),
        RUN: json.dumps(draft.run, indent=1).encode(),
    }


def _write(draft: Draft, temporary: Location, verify: bool, ranks: Ranks) -> None:
    ranks.each(lambda: _wait_for(temporary))
    own = draft.write(temporary)
    if verify:
        ranks.each(lambda: _read_back(temporary, own.files, ranks))
    written = ranks.each(lambda: own)
    ranks.first(lambda: _finish(draft, temporary, written))


def _wait_for(path: Location) -> None:
    if isinstance(path, RemotePath):  # an empty folder may not exist there at all
        return
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not path.is_dir():
        if time.monotonic() > deadline:
            raise SaveError(
                f"{socket.gethostname()} does not see {path}, which the first rank made: --save must be a folder that "
                "all machines share"
            )
        time.sleep(0.05)


def _read_back(temporary: Location, files: Mapping[str, FileRecord], ranks: Ranks) -> None:
    for name in files:
        drop_from_cache(temporary / name)
    if faults := content_faults(temporary, files, ranks.progress):
        raise CorruptCheckpoint(f"what was read back is not what was written: {'; '.join(faults)}")


def _finish(draft: Draft, temporary: Location, written: Iterable[Written]) -> None:
    """First rank, when all files are on the disk: manifest, name, tracker."""
    files = {name: write_synced(temporary / name, data) for name, data in _documents(draft).items()}
    tensors: dict[str, TensorRecord] = {}
    for part in written:
        files.update(part.files)
        tensors.update(part.tensors)
    manifest = Manifest(
        payload=draft.payload, iteration=draft.iteration, torch=torch.__version__, files=files, tensors=tensors
    )
    lengths = {name: record.bytes for name, record in files.items()}
    if lengths != (found := files_below(temporary)):
        wrong = sorted(name for name in lengths | found if lengths.get(name) != found.get(name))
        raise SaveError(f"files changed while the checkpoint was written: {', '.join(wrong)}")
    write_synced(temporary / MANIFEST, manifest.to_bytes())
    if isinstance(temporary, Path):
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_dir():
                sync_folder(path)
    folder.install(temporary, draft.final)
    folder.move_tracker(draft.root, draft.iteration)


def _advice(error: Exception) -> str:
    numbers = {failure.errno for failure in error.failures} if isinstance(error, RanksFailed) else set()
    if numbers & {*_NO_SPACE}:
        return "Free space there, keep fewer checkpoints (--keep-last), or choose another folder (--save)"
    if numbers - {None}:
        return "Choose a folder that all ranks can write (--save)"
    return "Nothing of it is left behind"


def _abandon(root: Location, ranks: Ranks) -> str:
    """Make room again after a failure and tell which checkpoint is the last good one."""

    def step() -> str:
        with contextlib.suppress(OSError):
            folder.tidy(root)
        good = list(folder.list_checkpoints(root).items())
        return f"The last good checkpoint is iteration {good[-1][0]} in {good[-1][1]}" if good else ""

    try:
        return ranks.first(step) or "There is no earlier checkpoint in this folder"
    except RanksFailed as error:
        return f"Whether there is an earlier checkpoint is unknown ({error})"


def _delete_obsolete(draft: Draft, retention: Retention, log: Log) -> None:
    """A checkpoint that cannot be deleted is a nuisance, no reason to stop training."""
    present = folder.list_checkpoints(draft.root)
    doomed = folder.obsolete(
        present, draft.iteration, keep_last=retention.keep_last, retain_interval=retention.retain_interval
    )
    for iteration in doomed:
        try:
            folder.delete(present[iteration])
        except OSError as error:
            log(f"WARNING: could not delete the old checkpoint {present[iteration]}: {error}")


def check_writable(root: str | Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Find out at start-up, not hours later, whether checkpoints can be written. Called by all ranks of `group`.

    Raises:
        SaveError: on all ranks, if one of them cannot make, write or see files there.
    """
    root = location(root)
    ranks = Ranks.of(group)
    try:
        token = ranks.first(lambda: _make_folder(root))
        ranks.each(lambda: _wait_for(root))
        ranks.each(lambda: folder.probe(root, f".write-test-{token}-{ranks.rank}"))
    except RanksFailed as error:
        raise SaveError(f"checkpoints cannot be written to {root}: {error}. {_advice(error)}") from error


def _make_folder(root: Location) -> str:
    root.mkdir(parents=True, exist_ok=True)
    return secrets.token_hex(4)
