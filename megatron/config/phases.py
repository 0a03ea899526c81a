"""Parts of a run: the batch grows and samples get longer, in one process.

Data is read in samples of the full length. Where samples are shorter, one of the data is cut into several, so that no
token is left out and none is trained on twice.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Phase:
    """One part."""

    start: int
    """Consumed samples from which it holds: it begins with the first step that finds so many."""
    batch: int
    """Samples of a step."""
    pieces: int = 1
    """Samples that one sample of the data is cut into."""


@dataclass(frozen=True)
class Phases:
    """The parts of a run, in order; the first one starts at 0."""

    parts: tuple[Phase, ...]

    def at(self, consumed: int) -> Phase:
        """The part of the step that starts after `consumed` samples."""
        return self.parts[bisect.bisect_right([part.start for part in self.parts], consumed) - 1]

    def taken(self, consumed: int) -> Iterator[tuple[Phase, int]]:
        """Every part with the samples among the first `consumed` ones that were taken in it."""
        begin = 0
        for part, following in pairwise((*self.parts, None)):
            assert part is not None
            end = consumed
            if following is not None:  # a part ends with the step that reaches the start of the next one
                end = min(consumed, begin + -(-max(0, following.start - begin) // part.batch) * part.batch)
            yield part, end - begin
            begin = end

    def iterations(self, samples: int) -> int:
        """Whole steps that the first `samples` samples are enough for."""
        return sum(taken // part.batch for part, taken in self.taken(samples))

    def read(self, consumed: int) -> int:
        """Samples of the data that the first `consumed` samples were cut from."""
        return sum(-(-taken // part.pieces) for part, taken in self.taken(consumed))


def phases(
    batches: Sequence[int] | None, starts: Sequence[int] | None, lengths: Sequence[int] | None, seq_length: int
) -> Phases | None:
    """The parts that the flags describe; None without them.

    Args:
        batches: `--scheduler-batch-size`.
        starts: `--batch-sched-samples`.
        lengths: `--scheduler-seq-length`; None = `seq_length` in every part.
        seq_length: `--seq-length`, the length of the data's samples.
    """
    if batches is None or starts is None:
        return None
    pieces = [seq_length // length for length in lengths or [seq_length] * len(batches)]
    return Phases(tuple(Phase(*row) for row in zip(starts, batches, pieces, strict=True)))
