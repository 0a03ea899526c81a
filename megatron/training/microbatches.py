"""Global batch size and number of micro-batches: pure functions of the number of consumed samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron.config.phases import Phases


class BatchSizeError(ValueError):
    """A global batch size that cannot be cut into micro-batches, or a ramp-up that cannot be."""


@dataclass(frozen=True)
class RampUp:
    """`--rampup-batch-size <start> <increment> <samples>`: the global batch size grows in equal steps.

    Each of the `(global batch size - start) / increment` steps lasts the same share of `samples` (Megatron).
    """

    start: int
    increment: int
    samples: int

    @classmethod
    def parse(cls, values: Sequence[str | int]) -> RampUp:
        """The ramp-up that the three values of the flag describe.

        Raises:
            BatchSizeError: not three integers, or a value that makes no sense.
        """
        usage = "--rampup-batch-size <start batch size> <batch size increment> <ramp-up samples>"
        got = f"got {' '.join(str(value) for value in values)!r}"
        try:
            start, increment, samples = (int(value) for value in values)
        except ValueError:
            raise BatchSizeError(f"expected the following format: {usage}; {got}") from None
        if start <= 0 or increment <= 0 or samples < 0:
            raise BatchSizeError(f"{usage}: the first two must be more than 0 and the third at least 0; {got}")
        return cls(start, increment, samples)


@dataclass(frozen=True)
class BatchSize:
    """The global batch size at some point of training, and how many micro-batches each data-parallel rank runs."""

    samples: int
    microbatches: int
    pieces: int = 1
    """Micro-batches that one of the data is cut into: samples are that much shorter."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The global batch size over the whole run.

    Attributes:
        global_batch_size: samples per step, after the ramp-up if there is one.
        micro_batch_size: samples per forward pass of one data-parallel rank.
        data_parallel_size: number of data-parallel ranks.
        ramp_up: None for a constant size.
        phases: parts with sizes of their own, in place of the two; the last one's is `global_batch_size`.

    Raises:
        BatchSizeError: when built, if any size that will occur is not a multiple of
            `micro_batch_size * data_parallel_size`, so that a run cannot fail in the middle of its ramp-up.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    ramp_up: RampUp | None = None
    phases: Phases | None = None

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "data_parallel_size"):
            if getattr(self, name) <= 0:
                raise BatchSizeError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.ramp_up is not None:
            _check_ramp_up(self.ramp_up, self.global_batch_size)
        share = self.micro_batch_size * self.data_parallel_size
        for size in self.sizes():
            if size % share:
                raise BatchSizeError(
                    f"global batch size ({size}) is not divisible by micro batch size ({self.micro_batch_size}) "
                    f"times data parallel size ({self.data_parallel_size}); "
                    f"change --global-batch-size or --micro-batch-size"
                    + (" or --rampup-batch-size" if self.ramp_up is not None else "")
                )

    def sizes(self) -> list[int]:
        """Every global batch size that occurs, in order."""
        if self.phases is not None:
            return [part.batch for part in self.phases.parts]
        if self.ramp_up is None:
            return [self.global_batch_size]
        first = self.ramp_up.start if self.ramp_up.samples > 0 else self.global_batch_size
        return list(range(first, self.global_batch_size + 1, self.ramp_up.increment))

    def at(self, consumed_samples: int) -> BatchSize:
        """The batch size of the step that starts after `consumed_samples` samples."""
        size = self._size(consumed_samples)
        pieces = 1 if self.phases is None else self.phases.at(consumed_samples).pieces
        return BatchSize(size, size // (self.micro_batch_size * self.data_parallel_size), pieces)

    @property
    def final(self) -> BatchSize:
        """The batch size after the ramp-up: that of evaluations, too."""
        return BatchSize(
            self.global_batch_size, self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)
        )

    def read(self, consumed_samples: int) -> int:
        """Samples of the data that have been read when `consumed_samples` have been trained on."""
        return consumed_samples if self.phases is None else self.phases.read(consumed_samples)

    def _size(self, consumed_samples: int) -> int:
        if self.phases is not None:
            return self.phases.at(consumed_samples).batch
        ramp = self.ramp_up
        steps = 0 if ramp is None else (self.global_batch_size - ramp.start) // ramp.increment
        if ramp is None or steps == 0 or consumed_samples > ramp.samples or ramp.samples == 0:
            return self.global_batch_size
        # Exact: a step of the ramp-up need not last a whole number of samples.
        return ramp.start + ramp.increment * int(consumed_samples / Fraction(ramp.samples, steps))

    def iterations(self, samples: int) -> int:
        """How many whole steps `samples` samples are enough for, from the start of training."""
        if self.phases is not None:
            return self.phases.iterations(samples)
        count = consumed = 0
        if self.ramp_up is not None:
            while consumed <= self.ramp_up.samples and consumed + self._size(consumed) <= samples:
                consumed += self._size(consumed)
                count += 1
            if consumed <= self.ramp_up.samples:
                return count
        return count + max(0, samples - consumed) // self.global_batch_size

    def describe(self) -> str:
        """The line that the start-up log shows."""
        if self.phases is not None:
            parts = [
                f"{part.batch} samples" + (f" of a {part.pieces}th of the length" if part.pieces > 1 else "")
                for part in self.phases.parts
            ]
            starts = [f"from sample {part.start}" for part in self.phases.parts]
            return "global batch: " + "; ".join(" ".join(pair) for pair in zip(starts, parts, strict=True))
        if self.ramp_up is None:
            return f"setting number of micro-batches to constant {self.at(0).microbatches}"
        return (
            f"will use batch size rampup starting from global batch size {self.ramp_up.start} to global batch size "
            f"{self.global_batch_size} with batch size increments {self.ramp_up.increment} over "
            f"{self.ramp_up.samples} samples."
        )


def _check_ramp_up(ramp: RampUp, global_batch_size: int) -> None:
    """Refuse a ramp-up that does not end at the global batch size."""
    interval = global_batch_size - ramp.start
    if interval < 0:
        raise BatchSizeError(
            f"expected start batch size ({ramp.start}) to be at most the global batch size ({global_batch_size})"
        )
    if interval % ramp.increment:
        raise BatchSizeError(
            f"expected global batch size interval ({interval}) to be divisible by global batch size increment "
            f"({ramp.increment}); change --rampup-batch-size or --global-batch-size"
        )
