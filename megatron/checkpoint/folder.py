"""The folder that holds the checkpoints of a run: names, the tracker file, what may be deleted.

| in the folder                       | what it is                                                           |
|-------------------------------------|----------------------------------------------------------------------|
| `iter_0000100/`                     | a complete checkpoint                                                |
| `latest_checkpointed_iteration.txt` | the tracker: "100"                                                   |
| `.iter_0000200.tmp-1a2b3c4d/`       | being written, or left by a run that died                            |
| `.iter_0000100.replaced-1a2b3c4d/`  | for the moment in which another checkpoint takes its place           |
| `.iter_0000050.deleted-1a2b3c4d/`   | being deleted                                                        |

Where renaming is not atomic (`RemotePath`) a checkpoint is written under its own name and counts once its manifest,
which is written last, is there. Until then a file beside it says so:

| `.iter_0000200.unfinished`          | what `iter_0000200` holds without a manifest may be removed          |
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron.checkpoint.errors import CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.files import replace_synced, sync_folder, write_synced
from megatron.checkpoint.location import Location, RemotePath, location
from megatron.checkpoint.manifest import MANIFEST

TRACKER = "latest_checkpointed_iteration.txt"

_COMPLETE = re.compile(r"iter_(\d{7,})")
_REPLACED = re.compile(r"\.(iter_(\d{7,}))\.replaced-[0-9a-f]+")
_UNFINISHED = re.compile(r"\.(iter_\d{7,})\.unfinished")
_LEFTOVER = re.compile(rf"\.(iter_\d{{7,}}|{re.escape(TRACKER)})\.(tmp|deleted)-[0-9a-f]+|\.write-test-[0-9a-f]+-\d+")


def folder_of(root: Location, iteration: int) -> Location:
    """Where the checkpoint of an iteration is published."""
    return root / f"iter_{iteration:07d}"


def aside(path: Location, purpose: str) -> Location:
    """A hidden name beside `path` that nobody else uses; `purpose` is one of those at the top of this file."""
    return path.with_name(f".{path.name}.{purpose}-{secrets.token_hex(4)}")


def list_checkpoints(root: str | Location) -> dict[int, Location]:
    """The complete checkpoints of this project's format in a folder, by iteration in ascending order."""
    root = location(root)
    found: dict[int, Location] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        # Hidden names sort first: a published checkpoint wins over the one it replaced.
        match = _REPLACED.fullmatch(path.name) or _COMPLETE.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found[int(match.groups()[-1])] = path
    return dict(sorted(found.items()))


def latest(root: str | Location) -> int | None:
    """The iteration to resume from: what the tracker says, or without one the newest; None if there is nothing.

    Raises:
        CorruptCheckpoint: the tracker holds something else than a number.
        CheckpointMismatch: `root` is itself a checkpoint, or the tracker is that of another program's release.
    """
    root = location(root)
    if (root / MANIFEST).is_file():
        raise CheckpointMismatch(
            f"{root} is one checkpoint, not the folder that holds them: give {root.absolute().parent} (--load), and "
            "the iteration with --ckpt-step unless it is the latest"
        )
    tracker = root / TRACKER
    try:
        text = tracker.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return max(list_checkpoints(root), default=None)
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{tracker} cannot be read: {error}") from error
    if text == "release":
        raise CheckpointMismatch(f"{tracker} says 'release': a checkpoint of another program, which must be converted")
    if not (text.isascii() and text.isdecimal()):
        raise CorruptCheckpoint(f"{tracker} holds {text[:40]!r}, which is not an iteration")
    return int(text)


def holds_checkpoint(root: str | Location) -> bool:
    """Whether a run has written a checkpoint to a folder, be it damaged by now."""
    return (location(root) / TRACKER).exists() or bool(list_checkpoints(root))


def iteration_of_tag(tag: str) -> int:
    """The iteration that a name of a checkpoint stands for: "iter_0000100", DeepSpeed's "global_step100" or "100".

    Raises:
        ValueError: another kind of name.
    """
    match = re.fullmatch(r"(?:iter_|global_step)?(\d+)", tag)
    if match is None:
        raise ValueError(f"--load-tag {tag}: checkpoints are named iter_0000100 (or global_step100, or 100)")
    return int(match[1])


def move_tracker(root: Location, iteration: int) -> None:
    """Declare a complete checkpoint the one to resume from."""
    replace_synced(root / TRACKER, f"{iteration}".encode())


def begin(root: Location, iteration: int) -> Location:
    """Make the folder that a checkpoint is written to; it does not look like a checkpoint yet."""
    final = folder_of(root, iteration)
    if isinstance(final, RemotePath):
        if iteration in list_checkpoints(root):
            _retract(root, iteration)
        write_synced(_unfinished(final), b"")
        final.mkdir()
        return final
    temporary = aside(final, "tmp")
    temporary.mkdir()
    return temporary


def _unfinished(final: Location) -> Location:
    return final.with_name(f".{final.name}.unfinished")


def _retract(root: Location, iteration: int) -> None:
    """Remove a checkpoint whose name is needed again, after the tracker has gone to the one before it."""
    present = list_checkpoints(root)
    older = [number for number in present if number < iteration]
    if older:
        move_tracker(root, max(older))
    elif (root / TRACKER).exists():
        (root / TRACKER).unlink()
    delete(present[iteration])


def install(temporary: Location, final: Location) -> None:
    """Give a complete checkpoint its name; one that has it already is replaced without a moment of having neither."""
    if isinstance(temporary, RemotePath):
        _unfinished(temporary).unlink()
        return
    assert isinstance(final, Path)
    older = aside(final, "replaced") if final.exists() else None
    if older is not None:
        final.rename(older)
    temporary.rename(final)
    sync_folder(final.parent)
    if older is not None:
        remove_tree(older)


def remove_tree(path: Location) -> None:
    """Remove a folder with all that is in it."""
    if isinstance(path, RemotePath):
        path.remove_tree()
    else:
        shutil.rmtree(path)


def tidy(root: Location) -> None:
    """Remove what runs that died left behind, and bring back a checkpoint that one was about to replace."""
    complete = list_checkpoints(root)
    for path in list(root.iterdir()):
        replaced, unfinished = _REPLACED.fullmatch(path.name), _UNFINISHED.fullmatch(path.name)
        if unfinished:
            left = root / unfinished[1]
            if left.exists() and left not in complete.values():
                remove_tree(left)
            path.unlink()
        elif replaced and complete.get(int(replaced[2])) == path:
            path.rename(root / replaced[1])
        elif replaced or _LEFTOVER.fullmatch(path.name):
            remove_tree(path) if path.is_dir() else path.unlink()


def obsolete(
    iterations: Iterable[int], current: int, *, keep_last: int | None, retain_interval: int | None
) -> list[int]:
    """The checkpoints to delete after that of iteration `current` was written.

    Args:
        iterations: of all checkpoints. Those after `current` are of a run that was continued from an earlier point:
            they neither count nor are they deleted.
        current: the one that was just written; it is always kept.
        keep_last: how many of the newest to keep. None: only the newest if `retain_interval` is given, else all.
        retain_interval: also keep every multiple of this number of iterations.

    Raises:
        ValueError: a number that is not positive.
    """
    for name, value in (("--keep-last", keep_last), ("--save-retain-interval", retain_interval)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1, or absent to delete nothing")
    if keep_last is None and retain_interval is None:
        return []
    older = sorted(iteration for iteration in iterations if iteration <= current)
    kept = set(older[-(keep_last or 1) :])
    return [i for i in older if i not in kept and not (retain_interval and i % retain_interval == 0)]


def delete(path: Location) -> None:
    """Delete a checkpoint; at no moment does a part of it look like a whole one."""
    if isinstance(path, RemotePath):
        (path / MANIFEST).unlink()
        path.remove_tree()
        return
    doomed = aside(path, "deleted")
    path.rename(doomed)
    sync_folder(path.parent)
    remove_tree(doomed)


def probe(root: Location, name: str) -> None:
    """Write, sync and remove a file, as saving would."""
    path = root / name
    write_synced(path, b"can this folder be written?")
    path.unlink()
