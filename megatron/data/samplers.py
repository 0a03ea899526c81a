"""Which samples a data-parallel rank reads, from any position on.

A position counts the samples that all ranks together have read. Position p means the same samples for every number of
ranks and every micro-batch size, so a run can go on with other ones. A global batch of any size is the next n
micro-batches; batch-size ramp-up needs nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron.data.errors import DataError

PADDING = -1


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of one data-parallel rank."""

    rank: int = 0
    size: int = 1
    micro_batch_size: int

    @property
    def per_step(self) -> int:
        """Samples that one micro-step takes from the stream, over all ranks."""
        return self.size * self.micro_batch_size


@dataclass(frozen=True)
class SampleRef:
    """One place in the stream: its position, and the sample that is read there (PADDING for none)."""

    position: int
    index: int


@dataclass(frozen=True, kw_only=True)
class SequentialSampler:
    """Every sample once, in order (--dataloader-type single).

    Attributes:
        total: samples of the dataset.
        start: position to begin at.
        share: which part is this rank's.
        fill_last: end with a micro-batch filled up with padding instead of leaving out an incomplete one.
    """

    total: int
    start: int
    share: Share
    fill_last: bool = False

    def __len__(self) -> int:
        left = max(0, self.total - self.start)
        return -(-left // self.share.per_step) if self.fill_last else left // self.share.per_step

    def __iter__(self) -> Iterator[list[SampleRef]]:
        """Micro-batches of this rank."""
        first = self.start + self.share.rank * self.share.micro_batch_size
        for step in range(len(self)):
            begin = first + step * self.share.per_step
            positions = range(begin, begin + self.share.micro_batch_size)
            yield [SampleRef(p, p if p < self.total else PADDING) for p in positions]


@dataclass(frozen=True, kw_only=True)
class CyclicSampler:
    """All samples in a new random order each epoch, without end (--dataloader-type cyclic).

    Epoch e is `torch.randperm(total)` with the seed e, as in Megatron with --no-data-sharding. Ranks take consecutive
    parts of it, and an epoch is used to its last sample: a micro-batch may span two epochs.
    """

    total: int
    start: int
    share: Share

    def __post_init__(self) -> None:
        if self.total < 1:
            raise DataError("The dataset has no samples to cycle through.")

    def __iter__(self) -> Iterator[list[SampleRef]]:
        """Micro-batches of this rank."""
        position = self.start + self.share.rank * self.share.micro_batch_size
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            batch = []
            for place in range(position, position + self.share.micro_batch_size):
                if place // self.total != epoch:
                    epoch = place // self.total
                    order = torch.randperm(self.total, generator=torch.Generator().manual_seed(epoch))
                batch.append(SampleRef(place, int(order[place % self.total])))
            yield batch
            position += self.share.per_step


@dataclass(frozen=True, kw_only=True)
class ShardedCyclicSampler:
    """Megatron's cyclic order with data sharding: each rank shuffles within its own contiguous part.

    Which samples a rank reads then depends on the number of ranks and the micro-batch size; a run that is to go on
    exactly must keep both. Samples that do not fill a step are left out.
    """

    total: int
    start: int
    share: Share

    def __post_init__(self) -> None:
        if self.total < self.share.per_step:
            raise DataError(
                f"The dataset has {self.total} samples, less than the {self.share.per_step} of one micro-step."
            )
        if self.start % self.share.per_step:
            raise DataError(
                f"--dataloader-type cyclic with data sharding cannot go on at sample {self.start}: it is no multiple "
                f"of data-parallel size * --micro-batch-size = {self.share.per_step}. Keep both, or use "
                "--no-data-sharding."
            )

    def __iter__(self) -> Iterator[list[SampleRef]]:
        """Micro-batches of this rank."""
        steps = self.total // self.share.per_step
        part = steps * self.share.micro_batch_size
        step = self.start // self.share.per_step
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            if step // steps != epoch:
                epoch = step // steps
                order = torch.randperm(part, generator=torch.Generator().manual_seed(epoch))
            begin = (step % steps) * self.share.micro_batch_size
            chosen = order[begin : begin + self.share.micro_batch_size] + self.share.rank * part
            position = step * self.share.per_step + self.share.rank * self.share.micro_batch_size
            yield [SampleRef(position + i, index) for i, index in enumerate(chosen.tolist())]
            step += 1
