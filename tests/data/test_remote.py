"""Corpora behind URLs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megatron.data.datasets import build_datasets
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.remote import RemoteDataset
from megatron.data.settings import DataSettings, SampleCounts
from tests.data.corpora import EOD, VOCAB, write_corpus


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """A corpus in fsspec's memory:// store, which reads ranges as object stores do."""
    write_corpus(tmp_path / "a")
    store = fsspec.filesystem("memory")
    for end in (".bin", ".idx"):
        store.pipe_file(f"/bucket/a{end}", (tmp_path / f"a{end}").read_bytes())
    yield "memory://bucket/a"
    store.rm("/bucket", recursive=True)


def test_samples_are_those_of_the_local_corpus(bucket: str, tmp_path: Path) -> None:
    found = []
    for prefix in (bucket, str(tmp_path / "a")):
        settings = DataSettings(seq_length=16, seed=3, data_path=(prefix,), data_cache_path=tmp_path / "cache")
        counts = SampleCounts(train=50, valid=0, test=0)
        built = build_datasets(settings, counts, vocab_size=VOCAB, eod=EOD, report=lambda line: None).train
        assert built is not None
        found.append([built[i].tolist() for i in range(50)])
    assert found[0] == found[1]


def test_it_reads_parts_and_crosses_to_workers(bucket: str, tmp_path: Path) -> None:
    remote, local = RemoteDataset(bucket, tmp_path / "cache"), IndexedDataset(tmp_path / "a")
    again = pickle.loads(pickle.dumps(remote))
    for sequence in range(len(local)):
        size = int(local.lengths[sequence])
        assert again.read(sequence, size // 2, size).tolist() == local.read(sequence, size // 2, size).tolist()
    assert remote.fingerprint() == local.fingerprint()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_is_wrong_is_said(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="memory://bucket/none"):
        RemoteDataset("memory://bucket/none", tmp_path)
    with pytest.raises(DataError, match="Protocol not known"):
        RemoteDataset("nosuch://bucket/a", tmp_path)
    fsspec.filesystem("memory").pipe_file("/bucket/a.bin", b"12")
    with pytest.raises(DataError, match=r"has 2 bytes, its \.idx describes"):
        RemoteDataset(bucket, tmp_path)
    settings = DataSettings(seq_length=16, seed=3, data_path=(bucket,))
    with pytest.raises(DataError, match="give a local folder for its index with --data-cache-path"):
        build_datasets(
            settings, SampleCounts(train=5, valid=0, test=0), vocab_size=VOCAB, eod=EOD, report=lambda line: None
        )
