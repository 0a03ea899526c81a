"""Positions mean the same samples in every layout, and orders are Megatron's."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from megatron.data.errors import DataError
from megatron.data.samplers import PADDING, CyclicSampler, SequentialSampler, ShardedCyclicSampler, Share

LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2)]


def stream(kind, total, start, ranks, micro_batch_size, steps):
    """Samples in the order of their positions, read by all ranks of a layout."""
    refs = []
    for rank in range(ranks):
        share = Share(rank=rank, size=ranks, micro_batch_size=micro_batch_size)
        for batch in islice(iter(kind(total=total, start=start, share=share)), steps):
            assert len(batch) == micro_batch_size
            refs += batch
    refs.sort(key=lambda ref: ref.position)
    assert [ref.position for ref in refs] == list(range(start, start + len(refs)))
    return [ref.index for ref in refs]


@pytest.mark.parametrize("kind", [SequentialSampler, CyclicSampler])
@pytest.mark.parametrize(("ranks", "micro_batch_size"), LAYOUTS)
def test_any_layout_goes_on_where_another_stopped(kind, ranks, micro_batch_size):
    reference = stream(kind, 50, 0, 1, 1, 48)
    for start in (0, 5, 24):
        steps = (48 - start) // (ranks * micro_batch_size)
        read = stream(kind, 50, start, ranks, micro_batch_size, steps)
        assert read == reference[start : start + len(read)]
        assert len(read) == steps * ranks * micro_batch_size


def test_cyclic_takes_each_sample_once_per_epoch_in_new_orders():
    read = stream(CyclicSampler, 10, 0, 2, 2, 10)
    epochs = [read[begin : begin + 10] for begin in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[1] == torch.randperm(10, generator=torch.Generator().manual_seed(1)).tolist()


def plain_sharded(total, consumed, rank, ranks, micro_batch_size, batches):
    """Megatron's MegatronPretrainingRandomSampler with data sharding, restarted at the end of each epoch."""
    read = []
    while len(read) < batches:
        active = total - total % (ranks * micro_batch_size)
        epoch, within = divmod(consumed, active)
        bucket = total // (ranks * micro_batch_size) * micro_batch_size
        order = torch.randperm(bucket, generator=torch.Generator().manual_seed(epoch)).tolist()
        mine = [rank * bucket + index for index in order[within // ranks :]]
        for begin in range(0, len(mine) - micro_batch_size + 1, micro_batch_size):
            read.append(mine[begin : begin + micro_batch_size])
            consumed += ranks * micro_batch_size
    return read[:batches]


@pytest.mark.parametrize(("ranks", "micro_batch_size"), LAYOUTS)
def test_sharded_cyclic_is_megatrons(ranks, micro_batch_size):
    for start in (0, 24, 48):
        for rank in range(ranks):
            share = Share(rank=rank, size=ranks, micro_batch_size=micro_batch_size)
            sampler = ShardedCyclicSampler(total=29, start=start, share=share)
            ours = [[ref.index for ref in batch] for batch in islice(iter(sampler), 40)]
            assert ours == plain_sharded(29, start, rank, ranks, micro_batch_size, 40)


def test_sharded_cyclic_refuses_a_position_of_another_layout():
    with pytest.raises(DataError, match="--no-data-sharding"):
        ShardedCyclicSampler(total=29, start=6, share=Share(size=2, micro_batch_size=2))
    with pytest.raises(DataError, match="less than the 30"):
        ShardedCyclicSampler(total=29, start=0, share=Share(size=2, micro_batch_size=15))


def test_the_last_micro_batch_is_left_out_or_filled():
    for rank, expected in ((0, [[0, 1], [4, 5], [8, PADDING]]), (1, [[2, 3], [6, 7], [PADDING, PADDING]])):
        share = Share(rank=rank, size=2, micro_batch_size=2)
        filled = SequentialSampler(total=9, start=0, share=share, fill_last=True)
        assert [[ref.index for ref in batch] for batch in filled] == expected
        assert len(filled) == 3
        dropped = SequentialSampler(total=9, start=0, share=share)
        assert [[ref.index for ref in batch] for batch in dropped] == expected[:2]
        assert list(SequentialSampler(total=9, start=20, share=share)) == []
