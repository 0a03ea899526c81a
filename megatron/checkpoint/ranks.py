"""Steps that all ranks take together: an error on one of them becomes the same error on every one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch.distributed as dist

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import Progress, nothing

T = TypeVar("T")

_FAILURES_SHOWN = 4


@dataclass(frozen=True)
class Failure:
    """Why a step failed on one rank; `errno` is the system's number where it was a system call that failed."""

    rank: int
    text: str
    errno: int | None

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe an exception."""
        number = error.errno if isinstance(error, OSError) else None
        text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return cls(rank, text, number)


class RanksFailed(Exception):
    """A step failed on some ranks; raised on all of them."""

    def __init__(self, failures: Iterable[Failure]) -> None:
        self.failures = tuple(sorted(set(failures), key=lambda failure: failure.rank))
        shown = [f"rank {failure.rank}: {failure.text}" for failure in self.failures[:_FAILURES_SHOWN]]
        more = len(self.failures) - len(shown)
        super().__init__("; ".join(shown) + (f"; and {more} more ranks" if more else ""))


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What a step came to on one rank, in a form that can be sent to the others."""

    value: T | None = None
    failures: tuple[Failure, ...] = ()
    verdict: CheckpointError | None = None


@dataclass(frozen=True)
class Ranks:
    """The processes that save or load together.

    Attributes:
        group: their process group; None for all processes, or for a process that runs alone.
        rank: index of this process among them.
        size: number of processes.
        progress: called whenever this process gets further: with a step of all, a tensor, a piece of a file.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    progress: Progress = nothing

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, progress: Progress = nothing) -> Ranks:
        """The ranks of a group (None: all); one rank when torch.distributed is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1, progress)
        return cls(group, dist.get_rank(group), dist.get_world_size(group), progress)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that acts for all."""
        return self.rank == 0

    def each(self, step: Callable[[], T]) -> list[T]:
        """Take a step on every rank and return what it came to on each.

        Raises:
            CheckpointError: the one that `step` raised on the lowest rank that raised one.
            RanksFailed: with every other exception that `step` raised anywhere.
        """
        own, error = self._attempt(step)
        self.progress()
        return _settle(self._all_gather(own), error)

    def first(self, step: Callable[[], T]) -> T:
        """Take a step on the first rank alone and return what it came to, on every rank; raises as `each`."""
        own, error = self._attempt(step) if self.is_first else (_Outcome[T](), None)
        self.progress()
        return _settle([self.of_one(0, own)], error)[0]

    def _attempt(self, step: Callable[[], T]) -> tuple[_Outcome[T], Exception | None]:
        try:
            return _Outcome(value=step()), None
        except CheckpointError as error:
            return _Outcome(verdict=error), error
        except RanksFailed as error:
            return _Outcome(failures=error.failures), error
        except Exception as error:
            return _Outcome(failures=(Failure.of(self.rank, error),)), error

    def _all_gather(self, value: _Outcome[T]) -> list[_Outcome[T]]:
        if self.size == 1:
            return [value]
        values: list[_Outcome[T]] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def of_one(self, rank: int, value: T) -> T:
        """What one of the ranks has, on every rank."""
        if self.size == 1:
            return value
        source = rank if self.group is None else dist.get_global_rank(self.group, rank)
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self.group)
        return values[0]


def _settle(outcomes: list[_Outcome[T]], cause: Exception | None) -> list[T]:
    """The values, or the error that all ranks agree on."""
    verdicts = [outcome.verdict for outcome in outcomes if outcome.verdict is not None]
    if verdicts:
        raise verdicts[0] from (cause.__cause__ if isinstance(cause, CheckpointError) else cause)
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    if failures:
        raise RanksFailed(failures) from cause
    return [outcome.value for outcome in outcomes]  # type: ignore[misc]


def on_first_rank(step: Callable[[], T]) -> T:
    """Take a step on the first rank of all alone and return what it came to, on every rank.

    Raises:
        CheckpointError: the one that `step` raised.
        RanksFailed: for any other exception.
    """
    return Ranks.of(None).first(step)
