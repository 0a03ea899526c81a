"""The checkpoints of a run, one after the other: written while training waits, or in a thread while it goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron.checkpoint.agreement import drifts, heal, listing
from megatron.checkpoint.files import Progress, nothing
from megatron.checkpoint.parts import Stored
from megatron.checkpoint.pieces import copy_to_host
from megatron.checkpoint.publish import Log
from megatron.checkpoint.ranks import Ranks
from megatron.checkpoint.save import TrainingState, save

WRITER = "checkpoint-writer"
"""Name of the thread that writes, of which a number is made."""


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """How the checkpoints of a run are written; see `megatron.checkpoint.save` for what the first three mean."""

    keep_last: int | None = None
    retain_interval: int | None = None
    verify: bool = False
    background: bool = False
    """Training waits only until its tensors are copied to the host. The copies stay allocated: a rank needs memory for
    one of everything that it holds."""


class Saver:
    """Writes the checkpoints of a run to a folder. Every method is called by all ranks.

    Args:
        root: folder of the run's checkpoints.
        settings: how they are written.
        group: the ranks; None: all. In the background it must be one that nobody else uses, on the CPU.
        log: called on the first rank, also from the thread that writes.
        progress: called on every rank whenever it gets further, also from that thread.
    """

    def __init__(
        self,
        root: str | Path,
        settings: SaveSettings,
        *,
        group: dist.ProcessGroup | None = None,
        log: Log = print,
        progress: Progress = nothing,
    ) -> None:
        self.root = root
        self._settings = settings
        self._group = group
        self._ranks = Ranks.of(group, progress)
        self._log, self._progress = log, progress
        self._thread = ThreadPoolExecutor(1, WRITER) if settings.background else None
        self._copies: dict[str, Stored] = {}
        self._pending: Future[None] | None = None

    def heal(self, tensors: Mapping[str, Stored]) -> bool:
        """Give ranks that hold another value than most that of the most, and say so; whether anything was changed.

        Raises:
            SaveError: as `finish`: the thread that writes talks over the same group, so it comes first.
        """
        self.finish()
        found = drifts(tensors, self._ranks)
        if found and self._ranks.is_first:
            self._log(f"WARNING: HEALED by the value of the ranks named first: {listing(found)}")
        heal(tensors, found, self._ranks)
        return bool(found)

    def save(self, iteration: int, state: TrainingState) -> None:
        """Write a checkpoint, or begin to: a save waits for the one before it.

        Raises:
            SaveError: on all ranks; in the background it is about the save before.
        """
        started = time.perf_counter()
        if self._thread is None:
            self._write(iteration, state)
            self._say(f"  training stood still for {time.perf_counter() - started:.3f} s")
            return
        self.finish()
        copying = time.perf_counter()
        self._copies = copy_to_host(state.tensors, self._copies)
        copied = time.perf_counter()
        self._pending = self._thread.submit(self._write, iteration, replace(state, tensors=self._copies))
        self._say(
            f"  training stood still for {copied - started:.3f} s ({copying - started:.3f} s of it until the "
            f"checkpoint before was written); it goes on while iteration {iteration} is written"
        )

    def finish(self) -> None:
        """Wait until what was begun is written.

        Raises:
            SaveError: it could not be written; on all ranks.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, iteration: int, state: TrainingState) -> None:
        s = self._settings
        try:
            save(
                self.root,
                iteration,
                state,
                keep_last=s.keep_last,
                retain_interval=s.retain_interval,
                verify=s.verify,
                group=self._group,
                log=self._log,
                progress=self._progress,
            )
        except Exception as error:
            if s.background:  # whoever waits for the thread may do so much later
                self._say(f"ERROR: iteration {iteration} was not saved; the run ends at the next checkpoint: {error}")
            raise

    def _say(self, message: str) -> None:
        if self._ranks.is_first:
            self._log(message)
