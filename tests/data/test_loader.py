"""Streams of micro-batches: resuming, full passes, workers, ranks that fail together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.data.errors import DataError
from megatron.data.loader import Consumed, DataIterators, build_data_iterators
from megatron.data.samplers import Share
from megatron.data.settings import DataSettings, SampleCounts
from tests.data.corpora import EOD, GOLDEN, VOCAB, write_corpus
from tests.support import run_ranks

SEQ = 16
COUNTS = SampleCounts(train=120, valid=12, test=0)
START = Consumed()


def build(
    settings: DataSettings, share: Share, counts: SampleCounts = COUNTS, consumed: Consumed = START
) -> DataIterators:
    return build_data_iterators(settings, counts, share=share, vocab_size=VOCAB, eod=EOD, consumed=consumed)


def blend_settings(folder: Path, **changes) -> DataSettings:
    paths = ("0.3", str(GOLDEN / "a"), "0.7", str(GOLDEN / "b"))
    common = {"data_path": paths, "split": "90,10", "seq_length": SEQ, "seed": 5, "num_workers": 0}
    return DataSettings(data_cache_path=folder, **{**common, **changes})


def read(folder: Path, ranks: int, micro_batch_size: int, start: int, stop: int, **changes) -> list[list[int]]:
    """Samples of training positions [start, stop), whatever the layout."""
    rows: dict[int, list[int]] = {}
    for rank in range(ranks):
        share = Share(rank=rank, size=ranks, micro_batch_size=micro_batch_size)
        stream = build(blend_settings(folder, **changes), share, consumed=Consumed(train=start)).train
        for step in range((stop - start) // share.per_step):
            batch = next(stream)
            first = start + step * share.per_step + rank * micro_batch_size
            for i, row in enumerate(torch.cat([batch.tokens, batch.labels], dim=1).tolist()):
                rows[first + i] = row
    return [rows[position] for position in range(start, stop)]


@pytest.mark.parametrize("kind", ["single", "cyclic"])
def test_a_run_goes_on_exactly_with_another_layout(kind, tmp_path):
    reference = read(tmp_path, 1, 1, 0, 48, dataloader_type=kind)
    assert read(tmp_path, 2, 4, 0, 24, dataloader_type=kind) == reference[:24]
    assert read(tmp_path, 3, 2, 24, 48, dataloader_type=kind) == reference[24:]
    assert len({tuple(row) for row in reference}) > 40


def test_dropout_seeds_depend_on_the_position_only(tmp_path):
    one = build(blend_settings(tmp_path), Share(micro_batch_size=2)).train
    seeds = [next(one).dropout_seed for _ in range(6)]
    assert len(set(seeds)) == 6
    second = build(
        blend_settings(tmp_path), Share(rank=1, size=2, micro_batch_size=2), consumed=Consumed(train=4)
    ).train
    assert [next(second).dropout_seed for _ in range(2)] == [seeds[3], seeds[5]]
    other_run = build(blend_settings(tmp_path, seed=6), Share(micro_batch_size=2)).train
    assert next(other_run).dropout_seed != seeds[0]


def test_workers_read_what_one_process_reads(tmp_path):
    share = Share(micro_batch_size=3)
    here = build(blend_settings(tmp_path, num_workers=0), share).train
    there = build(blend_settings(tmp_path, num_workers=2), share).train
    for _ in range(8):
        ours, theirs = next(here), next(there)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.dropout_seed == theirs.dropout_seed


def test_a_counted_evaluation_goes_on_where_the_last_one_stopped(tmp_path):
    share = Share(micro_batch_size=2)
    stream = build(blend_settings(tmp_path), share).valid
    seen = [next(stream).tokens for _ in range(6)]
    resumed = build(blend_settings(tmp_path), share, consumed=Consumed(valid=8)).valid
    assert torch.equal(next(resumed).tokens, seen[4])


def full_pass(folder: str, rank: int, ranks: int) -> tuple[list[np.ndarray], int]:
    settings = DataSettings(
        train_data_path=(str(GOLDEN / "b"),),
        valid_data_path=(str(GOLDEN / "a"), str(GOLDEN / "c")),
        seq_length=SEQ,
        seed=5,
        num_workers=0,
        data_cache_path=Path(folder),
    )
    counts = SampleCounts(train=1, valid=None, test=None)
    stream = build(settings, Share(rank=rank, size=ranks, micro_batch_size=5), counts).valid
    first = list(stream)
    assert next(stream, None) is None
    stream.rewind()
    again = list(stream)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    rows = [row for batch in first for row, mask in zip(batch.tokens, batch.loss_mask, strict=True) if mask.sum()]
    return [row.numpy() for row in rows], len(first)


def test_a_full_pass_takes_everything_once_in_equal_steps(tmp_path):
    alone, _ = full_pass(str(tmp_path), 0, 1)
    parts = [full_pass(str(tmp_path), rank, 3) for rank in range(3)]
    assert len({steps for _, steps in parts}) == 1
    together = [row for rows, _ in parts for row in rows]
    assert len(alone) % 15 != 0
    assert sorted(row.tolist() for row in together) == sorted(row.tolist() for row in alone)


def test_masks_reach_the_batch(tmp_path):
    settings = blend_settings(tmp_path, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    batch = next(build(settings, Share(micro_batch_size=8)).train)
    assert batch.position_ids.max() < SEQ
    assert batch.document_ids.max() > 0
    assert torch.equal(batch.loss_mask == 0, batch.tokens == EOD)


def test_mock_data_needs_no_files():
    settings = DataSettings(mock_data=True, seq_length=SEQ, seed=1, num_workers=0)
    streams = build(settings, Share(micro_batch_size=2), SampleCounts(train=10, valid=4, test=4))
    assert next(streams.train).tokens.shape == (2, SEQ)
    assert streams.valid is not None
    assert streams.test is not None


def start_together(folder: str, broken_rank: int | None) -> str:
    """All ranks prepare data from the same cache; one of them may lack a file."""
    import torch.distributed as dist

    rank = dist.get_rank()
    prefix = f"{folder}/missing" if rank == broken_rank else f"{folder}/x"
    settings = DataSettings(data_path=(prefix,), split="100", seq_length=SEQ, seed=1, num_workers=0)
    try:
        share = Share(rank=rank, size=dist.get_world_size(), micro_batch_size=1)
        batch = next(build(settings, share, SampleCounts(train=20, valid=0, test=0)).train)
    except DataError as error:
        return str(error)
    return f"read {batch.tokens.shape[1]}"


def test_ranks_start_together(tmp_path):
    write_corpus(tmp_path / "x")
    assert run_ranks(3, start_together, str(tmp_path), None) == [f"read {SEQ}"] * 3
    assert len(list((tmp_path / "index-cache").glob("*.json"))) == 1


def test_one_failing_rank_stops_all(tmp_path):
    write_corpus(tmp_path / "x")
    messages = run_ranks(3, start_together, str(tmp_path), 1)
    assert "missing.idx does not exist" in messages[1]
    assert "on 1 other rank" in messages[0]
    assert "on 1 other rank" in messages[2]


def test_new_data_under_the_same_name_gets_a_new_order(tmp_path):
    settings = DataSettings(data_path=(str(tmp_path / "x"),), split="100", seq_length=SEQ, seed=1, num_workers=0)
    counts = SampleCounts(train=20, valid=0, test=0)
    write_corpus(tmp_path / "x", seed=1)
    next(build(settings, Share(micro_batch_size=1), counts).train)
    write_corpus(tmp_path / "x", seed=2)
    fresh = next(build(settings, Share(micro_batch_size=1), counts).train)
    shutil.rmtree(tmp_path / "index-cache")
    rebuilt = next(build(settings, Share(micro_batch_size=1), counts).train)
    assert torch.equal(fresh.tokens, rebuilt.tokens)
