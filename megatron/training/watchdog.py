"""Notices that training stands still, says what every rank does, and ends them.

A rank that hangs leaves the others waiting for it in a collective, each with an error that names only itself, or none.
A thread on every rank therefore tells the others through the rendezvous store, every few seconds, where its main thread
is and since when. When a rank gets no further for too long, and no other rank does, the lowest one that still answers
prints where all of them are, first those that are not waiting for others, and all end with an error. An iteration, a
step of an evaluation, a tensor or a piece of a file that is read or written are what counts as getting further.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import thread as futures_thread
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_SECONDS_BETWEEN_BEATS = 10.0
_BEATS_PER_LIMIT = 5
_TIMES_THE_LONGEST = 10.0
_BEATS_TO_ANSWER = 3
_EXIT_CODE = 1
# What gloo says when its time is up; other backends end the process themselves.
_TIME_IS_UP = ("Timed out waiting", "timed out")


@dataclass(frozen=True)
class Beat:
    """What a rank tells the others; `number` grows as long as its process runs."""

    number: int
    host: str
    pid: int
    doing: str
    place: str
    waits: bool
    """The main thread is inside torch.distributed: it waits for other ranks."""
    idle: float = 0.0
    """Seconds since this rank got further."""


def limit_of(asked: float | None, collectives: float, longest: float | None, *, computes: bool = True) -> float | None:
    """Seconds within which a rank must get further; None: there is no limit.

    Args:
        asked: `--hang-timeout`.
        collectives: seconds after which a collective operation gives up.
        longest: seconds of the longest iteration so far.
        computes: it is an iteration, of which the first may compile and has no limit of its own, and no file.
    """
    if asked is not None:
        return asked
    if computes and longest is None:
        return None
    return max(collectives, _TIMES_THE_LONGEST * (longest or 0.0))


def describe(beats: Mapping[int, Beat | None], silent: frozenset[int]) -> list[str]:
    """One line for the ranks that are at one place: first those that do not answer, last those that wait for others.

    Args:
        beats: the last beat of each rank; None: it never had one.
        silent: ranks without a new beat in the last moments.
    """
    places: dict[tuple[int, str], list[int]] = defaultdict(list)
    for rank, beat in beats.items():
        if beat is None:
            places[0, "gives no sign of life"].append(rank)
            continue
        what = f"{beat.doing}, in {beat.place}"
        if rank in silent:
            where = f"process {beat.pid} on {beat.host}"
            places[0, f"does not answer ({where} is stopped, dead or out of reach); last seen: {what}"].append(rank)
        else:
            places[(2, f"waits for others: {what}") if beat.waits else (1, f"DOES NOT WAIT FOR OTHERS: {what}")].append(
                rank
            )
    return [
        f"  rank {', '.join(map(str, ranks))}: {text}"
        for (_, text), ranks in sorted(places.items(), key=lambda item: (item[0][0], len(item[1])))
    ]


def frame_of(thread: str) -> FrameType | None:
    """Where a thread of this name, of a pool, is at work; None if it is not."""
    own = next((one.ident for one in threading.enumerate() if one.name.startswith(thread)), None)
    frame = None if own is None else sys._current_frames().get(own)
    return None if frame is None or frame.f_code.co_filename == futures_thread.__file__ else frame


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is: its innermost function outside torch, and whether it is inside torch.distributed."""
    stack = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
    if not stack:
        return "an unknown place", False
    waits = "/torch/distributed/" in stack[-1].filename
    own = next((entry for entry in reversed(stack) if "/torch/" not in entry.filename), stack[-1])
    return f"{own.name} ({own.filename}:{own.lineno})", waits


class Watchdog:
    """Watches the main thread of this rank, within `watched`, while used as a context.

    Args:
        rank, world_size: of this process.
        asked: `--hang-timeout`, in seconds.
        collectives: time limit of collective operations, in seconds.
        store: how ranks tell each other where they are; None: a rank alone.
    """

    def __init__(
        self, *, rank: int, world_size: int, asked: float | None, collectives: float, store: dist.Store | None
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._asked, self._collectives = asked, collectives
        # A connection of its own: a thread that waits for a key would block the others on the same one.
        self._store = store.clone() if store is not None else None
        self._interval = min(_SECONDS_BETWEEN_BEATS, (asked or collectives) / _BEATS_PER_LIMIT)
        self._main = threading.main_thread().ident or 0
        self._doing, self._began = "the beginning", time.monotonic()
        self._since = self._began
        self._longest: float | None = None
        self._watching, self._computes, self._helper = False, True, ""
        self._gave_up = False
        self._number = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching = False
        if error is not None and any(text in str(error) for text in _TIME_IS_UP):
            self._gave_up = True
            self._say(f"a collective operation took longer than {self._collectives:g} s")
        self._done.set()
        self._thread.join()

    def begin(self, doing: str) -> None:
        """This rank got further and begins something."""
        self._doing, self._began = doing, time.monotonic()
        self._since = self._began

    def progress(self) -> None:
        """This rank got further with what it is at; any of its threads may say so."""
        self._since = time.monotonic()

    def end_of_iteration(self) -> None:
        """What was begun is an iteration, and over."""
        self._longest = max(self._longest or 0.0, time.monotonic() - self._began)

    def each(self, steps: Iterable[T], doing: str) -> Generator[T]:
        """Pass on the steps of something that computes; each is watched like an iteration."""
        for number, step in enumerate(steps, start=1):
            self.begin(f"{doing}, step {number}")
            yield step
            self.end_of_iteration()

    @contextlib.contextmanager
    def watched(self, doing: str, *, computes: bool = True, helper: str = "") -> Generator[None]:
        """Watch this rank while it does something, possibly in the middle of something else that is watched.

        Args:
            doing: what it is.
            computes: see `limit_of`.
            helper: name of a thread that the main thread may wait for; then the place is that thread's.
        """
        before = self._watching, self._computes, self._helper
        self.begin(doing)
        self._watching, self._computes, self._helper = True, computes, helper
        yield
        # Not after an error, which is told with what was being done.
        self._watching, self._computes, self._helper = before
        self.begin(f"what follows {doing}")

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self._beat()
            limit = limit_of(self._asked, self._collectives, self._longest, computes=self._computes)
            seconds = time.monotonic() - self._since
            if not self._watching or limit is None or seconds <= limit:
                continue
            what = f"{self._doing} has got no further for {seconds:.0f} s, longer than {limit:.0f} s (--hang-timeout)"
            if self._say(what, limit):
                sys.stderr.flush()
                os._exit(_EXIT_CODE)

    def _beat(self) -> Beat:
        """Tell the others where this rank is."""
        beat = self._look()
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # whoever keeps the store has gone; `_read` tells
                self._store.set(_key(self._rank), json.dumps(asdict(beat)))
        return beat

    def _look(self) -> Beat:
        helping = frame_of(self._helper) if self._helper else None
        place, waits = place_of(helping or sys._current_frames().get(self._main))
        if self._gave_up:
            place, waits = "a collective operation that it gave up", True
        self._number += 1
        idle = time.monotonic() - self._since
        return Beat(self._number, socket.gethostname(), os.getpid(), self._doing, place, waits, idle)

    def _say(self, what: str, limit: float = 0.0) -> bool:
        """Find out who still answers; the lowest such rank prints where all are.

        Returns:
            False, and nothing is printed, if a rank got further within the last `limit` seconds.
        """
        error = f"[rank {self._rank}] error: {what}."
        if (before := self._read()) is not None:
            for _ in range(_BEATS_TO_ANSWER):
                time.sleep(self._interval)
                self._beat()
        after = None if before is None else self._read()
        if before is None or after is None:
            keeper = "the process that keeps the store where ranks meet (torchrun, else rank 0) is gone or stopped"
            sys.stderr.write(f"{error} {keeper}. This one is in {self._look().place}\n")
            return True
        silent = frozenset(rank for rank, beat in after.items() if beat is None or beat == before[rank])
        if any(beat.idle < limit for rank, beat in after.items() if beat is not None and rank not in silent):
            return False
        if self._rank == min(after.keys() - silent):
            lines = "\n".join(describe(after, silent))
            sys.stderr.write(f"{error} Where the ranks are:\n{lines}\n")
            return True
        # A launcher ends all ranks when the first one leaves: let the other one speak.
        time.sleep(_BEATS_TO_ANSWER * self._interval)
        return True

    def _read(self) -> dict[int, Beat | None] | None:
        """The last beat of each rank; None if the store cannot be read, and then it must not be used any more."""
        if self._store is None:
            return {self._rank: self._beat()}
        found: list[dict[int, Beat | None]] = []
        # A store whose keeper is stopped answers nothing, for as long as that may take.
        reader = threading.Thread(target=_read_into, args=(found, self._store, self._world_size), daemon=True)
        reader.start()
        reader.join(max(_SECONDS_BETWEEN_BEATS, _BEATS_TO_ANSWER * self._interval))
        return found[0] if found else None


def _read_into(found: list[dict[int, Beat | None]], store: dist.Store, world_size: int) -> None:
    keys = [_key(rank) for rank in range(world_size)]
    with contextlib.suppress(RuntimeError):  # whoever keeps the store has gone
        found.append(
            {rank: Beat(**json.loads(store.get(key))) if store.check([key]) else None for rank, key in enumerate(keys)}
        )


def _key(rank: int) -> str:
    return f"megatron/beat/{rank}"
