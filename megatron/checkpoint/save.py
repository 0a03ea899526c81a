"""Saving: tensors in any layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.checkpoint.agreement import drifts, listing, not_finite
from megatron.checkpoint.errors import SaveError
from megatron.checkpoint.files import Progress, nothing
from megatron.checkpoint.location import Location, location
from megatron.checkpoint.parts import Stored
from megatron.checkpoint.publish import Draft, Log, Retention, Written, publish
from megatron.checkpoint.ranks import Ranks
from megatron.checkpoint.tensors import read_index, write_tensors
from megatron.checkpoint.verify import gaps


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a run needs to continue, in a form that no layout, device or engine shows through.

    Attributes:
        tensors: by name: "model.<parameter>" (float32 master weights, logical names), "optimizer.<entry>.<parameter>"
            (see `optimizer_tensors`). `DTensor`s of any mesh and placement, and `Parts`; a plain tensor is the same on
            every rank that has it. Ranks may have different ones, as pipeline stages do.
        progress: how far training is, JSON: iteration, consumed samples and tokens, schedules, counters.
        run: what is being trained, JSON: settings, architecture, ops table, versions, layout.
        vocab_size: tokens that exist: rows of the embedding and the head beyond it are padding, which differs
            between layouts, and are not stored. None: all rows are stored.
    """

    tensors: Mapping[str, Stored]
    progress: Mapping[str, Any]
    run: Mapping[str, Any]
    vocab_size: int | None = None


def save(
    root: str | Path,
    iteration: int,
    state: TrainingState,
    *,
    keep_last: int | None = None,
    retain_interval: int | None = None,
    verify: bool = False,
    group: dist.ProcessGroup | None = None,
    log: Log = print,
    progress: Progress = nothing,
) -> Path:
    """Write a checkpoint of all ranks' tensors and make it the one to resume from. Called by all ranks of `group`.

    Every rank writes what only it holds and a fair part of what several hold. Beyond the tensors themselves a rank
    needs memory for a copy of one tensor.

    Args:
        root: folder or URL of the run's checkpoints; made if missing. It belongs to one run at a time.
        iteration: training step after which this is.
        state: what to write; `progress` and `run` of the first rank are written.
        keep_last: delete all but this number of newest checkpoints afterwards. None: see `retain_interval`.
        retain_interval: keep every multiple of this number of iterations, and the newest, and delete the others.
            With neither, nothing is deleted.
        verify: refuse a state with NaN or infinite values, or of which ranks hold copies that differ; read every file
            back from the disk, and compare, and look for gaps in the tensors, before the checkpoint counts as
            written. The ranks share the work; see `agreement` for the memory.
        group: the ranks that hold the state; None: all. A group on the CPU keeps its messages off the devices.
        log: called on the first rank with Megatron's messages.
        progress: called on every rank whenever it gets further, for whoever watches that it does.

    Returns:
        The folder of the checkpoint.

    Raises:
        SaveError: on all ranks, if anything failed on any; earlier checkpoints are as they were.
    """
    ranks = Ranks.of(group, progress)

    def write(folder: Location) -> Written:
        if verify:
            _check_values(state, ranks)
        written = write_tensors(folder, state.tensors, state.vocab_size, ranks)
        if verify:
            _check_completeness(folder, state, ranks)
        return written

    draft = Draft(
        root=location(root),
        iteration=iteration,
        payload="tensors",
        write=write,
        progress=state.progress,
        run=state.run,
    )
    retention = Retention(keep_last=keep_last, retain_interval=retain_interval)
    return publish(draft, retention, verify=verify, ranks=ranks, log=log)


def _check_values(state: TrainingState, ranks: Ranks) -> None:
    """Refuse what nobody wants to continue from.

    Raises:
        SaveError: on all ranks.
    """
    faults = [fault for part in ranks.each(lambda: not_finite(state.tensors)) for fault in part]
    if faults:
        raise SaveError(f"the state is not finite (--verify-checkpoint): {listing(faults)}")
    if found := drifts(state.tensors, ranks):
        raise SaveError(
            f"copies have drifted apart (--verify-checkpoint; --heal-replica-drift repairs them): {listing(found)}"
        )


def _check_completeness(folder: Location, state: TrainingState, ranks: Ranks) -> None:
    """Check that the files hold every element of what any rank has.

    Raises:
        SaveError: on all ranks.
    """
    names = dict.fromkeys(name for part in ranks.each(lambda: list(state.tensors)) for name in part)
    if faults := ranks.first(lambda: gaps(read_index(folder), names)):
        raise SaveError(f"the files are not complete (--verify-checkpoint): {listing(faults)}")
