"""Loading: find the checkpoint, make sure that it is whole, fill tensors of whatever layout this run has."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.files import Progress, nothing, share_of
from megatron.checkpoint.folder import folder_of, latest, list_checkpoints
from megatron.checkpoint.location import Location, location
from megatron.checkpoint.manifest import (
    PROGRESS,
    RUN,
    Manifest,
    TensorRecord,
    check_presence,
    content_faults,
    read_manifest,
)
from megatron.checkpoint.parts import Stored
from megatron.checkpoint.publish import Log
from megatron.checkpoint.ranks import Ranks, RanksFailed
from megatron.checkpoint.tensors import read_tensors
from megatron.checkpoint.vocabulary import has_vocabulary_rows

T = TypeVar("T")

_NAMES_SHOWN = 8
# What a run measures itself: without it in the checkpoint, or in another shape, the run measures anew.
_MEASURED = ("fp8",)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a checkpoint says besides its tensors.

    Attributes:
        progress, run: what `save` was given, as JSON gives it back (tuples are lists).
        iteration: training step after which it was written.
        path: its folder.
    """

    progress: dict[str, Any]
    run: dict[str, Any]
    iteration: int
    path: Location


@dataclass(frozen=True)
class _Opened:
    loaded: Loaded
    manifest: Manifest


def load(
    root: str | Path,
    *,
    into: Mapping[str, Stored],
    iteration: int | None = None,
    sections: Collection[str] | None = None,
    strict: bool = True,
    vocab_size: int | None = None,
    verify: bool = False,
    fallback: bool = False,
    group: dist.ProcessGroup | None = None,
    log: Log = print,
    progress: Progress = nothing,
) -> Loaded | None:
    """Fill tensors in place from a checkpoint, whatever layout it was saved from. Called by all ranks of `group`.

    Args:
        root: folder of the run's checkpoints.
        into: by name, as in `TrainingState.tensors`, with the placements of this run. Floating-point values are
            converted to the tensor's dtype. Embedding rows beyond the stored vocabulary become zero.
        iteration: which checkpoint; None: the one the tracker names.
        sections: take only tensors whose name begins with one of these, for example {"model"}; None: all.
        strict: refuse a checkpoint that lacks tensors of `into` or has others; else say so and load the rest. What a
            run measures itself ("fp8") is never a reason to refuse one.
        vocab_size: tokens that exist, as for `TrainingState`; a checkpoint with another number is refused.
        verify: hash every file before use; the ranks share the work. Presence and lengths are always checked.
        fallback: if the checkpoint is damaged, say so loudly and take the newest older one that is whole.
        group: the ranks that load; None: all.
        log: called on the first rank with Megatron's messages.
        progress: called on every rank whenever it gets further, for whoever watches that it does.

    Returns:
        What else the checkpoint says; None if there is no checkpoint in the folder.

    Raises:
        CorruptCheckpoint: the checkpoint is damaged; the message names the file.
        CheckpointMismatch: it does not fit `into`, or `iteration` does not exist. On all ranks, as every error.
    """
    ranks = Ranks.of(group, progress)
    wanted = {name: tensor for name, tensor in into.items() if sections is None or _section(name) in sections}

    def attempt(path: Location) -> Loaded:
        opened = _open(path, verify, ranks)
        fitting = _fitting(opened, wanted, sections, strict, vocab_size, ranks, log)
        _read(opened, fitting, ranks)
        return opened.loaded

    return _with_messages(root, iteration, fallback, attempt, ranks, log)


def read_record(
    root: str | Path,
    *,
    iteration: int | None = None,
    fallback: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Loaded | None:
    """What a checkpoint says besides its tensors, before there is a model to load (--use-checkpoint-args).

    Arguments, result and errors are those of `load`, which also tells what a fallback means.
    """
    ranks = Ranks.of(group)
    return _with_messages(root, iteration, fallback, lambda path: _open(path, False, ranks).loaded, ranks, _say_nothing)


def _with_messages(
    root: str | Path,
    iteration: int | None,
    fallback: bool,
    attempt: Callable[[Location], Loaded],
    ranks: Ranks,
    log: Log,
) -> Loaded | None:
    """Attempt the candidates in order; every rank sees the same outcome of each."""
    candidates = ranks.first(lambda: _candidates(location(root), iteration, fallback=fallback, log=log))
    for index, (number, path) in enumerate(candidates, start=1):
        try:
            _say(ranks, log, f" loading checkpoint from {root} at iteration {number}")
            loaded = attempt(path)
        except CorruptCheckpoint as error:
            if index == len(candidates):
                raise
            _say(ranks, log, f"WARNING: {error}\nWARNING: FALLING BACK to the older checkpoint {candidates[index][1]}")
            continue
        _say(ranks, log, f"  successfully loaded checkpoint from {root} at iteration {number}")
        return loaded
    return None


def _say_nothing(_: str) -> None:
    pass


def _say(ranks: Ranks, log: Log, message: str) -> None:
    if ranks.is_first:
        log(message)


def _candidates(root: Location, iteration: int | None, *, fallback: bool, log: Log) -> list[tuple[int, Location]]:
    """The checkpoint to load and, with `fallback`, the older ones after it, newest first; empty if there is none."""
    present = list_checkpoints(root)
    try:
        chosen = latest(root) if iteration is None else iteration
    except CorruptCheckpoint as error:
        if not (fallback and present):
            raise
        chosen = max(present)
        log(f"WARNING: {error}\nWARNING: FALLING BACK to the newest checkpoint {present[chosen]}")
    if chosen is None:
        return []
    if iteration is not None and chosen not in present:
        known = ", ".join(str(i) for i in present) or "none"
        raise CheckpointMismatch(f"{root} has no checkpoint of iteration {chosen} (--ckpt-step); there are: {known}")
    older = [(i, present[i]) for i in sorted(present, reverse=True) if i < chosen]
    return [(chosen, present.get(chosen, folder_of(root, chosen))), *(older if fallback else [])]


def _open(path: Location, verify: bool, ranks: Ranks) -> _Opened:
    """Read what is said about a checkpoint and check its files.

    Raises:
        CorruptCheckpoint, CheckpointMismatch: on all ranks.
    """

    def step() -> _Opened:
        manifest = read_manifest(path)
        check_presence(path, manifest)
        if manifest.payload != "tensors":
            raise CheckpointMismatch(
                f"{path} holds files of DeepSpeed's own, as earlier versions wrote them with --deepspeed: go on with "
                "such a version"
            )
        progress, run = (json.loads((path / name).read_bytes()) for name in (PROGRESS, RUN))
        return _Opened(Loaded(progress=progress, run=run, iteration=manifest.iteration, path=path), manifest)

    try:
        opened = ranks.first(step)
        if verify:
            _verify_contents(opened, ranks)
    except RanksFailed as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    return opened


def _verify_contents(opened: _Opened, ranks: Ranks) -> None:
    files = opened.manifest.files
    names = share_of({name: record.bytes for name, record in files.items()}, ranks.rank, ranks.size)
    mine = {name: files[name] for name in names}
    faults = ranks.each(lambda: content_faults(opened.loaded.path, mine, ranks.progress))
    if found := [fault for part in faults for fault in part]:
        raise CorruptCheckpoint(f"{opened.loaded.path} is damaged: {'; '.join(found)}")


def _read(opened: _Opened, into: Mapping[str, Stored], ranks: Ranks) -> None:
    try:
        read_tensors(opened.loaded.path, into, ranks)
    except RanksFailed as error:
        # Find out which file it is; if all are as they were written, it is something else.
        _verify_contents(opened, ranks)
        raise CheckpointError(f"{opened.loaded.path} is whole but could not be loaded: {error}") from error


def _fitting(
    opened: _Opened,
    into: Mapping[str, Stored],
    sections: Collection[str] | None,
    strict: bool,
    vocab_size: int | None,
    ranks: Ranks,
    log: Log,
) -> dict[str, Stored]:
    """The tensors that can be loaded; all of them if strict.

    Raises:
        CheckpointMismatch: on all ranks.
    """
    stored = opened.manifest.tensors
    missing = [name for name in into if name not in stored]
    faults = {n: fault for n, t in into.items() if n in stored and (fault := _difference(n, stored[n], t, vocab_size))}
    present = {name: tensor for name, tensor in into.items() if name in stored and name not in faults}
    answers = ranks.each(lambda: (missing, faults, list(present)))
    lacking = [name for part, _, _ in answers for name in part]
    differing = {name: fault for _, part, _ in answers for name, fault in part.items()}
    used = {*differing, *(name for _, _, names in answers for name in names)}
    unused = [n for n in stored if n not in used and (sections is None or _section(n) in sections)]
    names_differ = [
        *_listing("missing in the checkpoint", _not_measured(lacking)),
        *_listing("not part of this run", _not_measured(unused)),
    ]
    shapes_differ = _listing("different", [differing[name] for name in _not_measured(differing)])
    if shapes_differ or (strict and names_differ):
        raise CheckpointMismatch(
            "\n  ".join([f"{opened.loaded.path} does not fit this run:", *names_differ, *shapes_differ])
            + "\nThe settings it was saved with are in its run.json (--use-checkpoint-args takes them); "
            "--no-load-optim loads the weights alone"
        )
    for line in names_differ:
        _say(ranks, log, f"WARNING: {opened.loaded.path}: {line}")
    for line in _measured([*lacking, *differing], unused):
        _say(ranks, log, f" {opened.loaded.path}: {line}")
    return present


def _section(name: str) -> str:
    return name.partition(".")[0]


def _not_measured(names: Iterable[str]) -> list[str]:
    return [name for name in names if _section(name) not in _MEASURED]


def _measured(lacking: Iterable[str], unused: Iterable[str]) -> list[str]:
    """What is said about measurements that cannot be taken over, or are not needed."""
    texts = {"not there, or of another shape; this run measures anew": lacking, "not needed by this run": unused}
    found = {text: {_section(name) for name in names} for text, names in texts.items()}
    return [f"{section}: {text}" for text, sections in found.items() for section in _MEASURED if section in sections]


def _listing(what: str, names: Sequence[str]) -> list[str]:
    unique = list(dict.fromkeys(names))
    if not unique:
        return []
    more = len(unique) - _NAMES_SHOWN
    return [f"{what} ({len(unique)}): {', '.join(unique[:_NAMES_SHOWN])}{f' and {more} more' if more > 0 else ''}"]


def _difference(name: str, stored: TensorRecord, tensor: Stored, vocab_size: int | None) -> str | None:
    """Why a stored tensor cannot be loaded into another; None if it can."""
    if tensor.is_meta:
        return f"{name} has no memory here (meta tensor)"
    saved, here = stored.shape, tuple(tensor.shape)
    if has_vocabulary_rows(name, here) and len(saved) == len(here) and saved[1:] == here[1:]:
        if vocab_size is not None and saved[0] != vocab_size:
            return f"{name} has {saved[0]} words, the tokenizer of this run {vocab_size}"
        fits = saved[0] <= here[0]
    else:
        fits = saved == here
    if not fits:
        return f"{name} is {list(saved)} in the checkpoint, {list(here)} here"
    dtype = getattr(torch, stored.dtype)
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
        return f"{name} is {stored.dtype} in the checkpoint, {str(tensor.dtype).removeprefix('torch.')} here"
    return None
