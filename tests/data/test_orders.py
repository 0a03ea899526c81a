"""Sample orders against those that Megatron Core produced (tests/golden/data/README.md)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.datasets import build_datasets
from megatron.data.errors import DataError
from megatron.data.gpt_dataset import GPTDataset, SampleRequest
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.sample_index import plan_epochs
from megatron.data.settings import (
    DataSettings,
    SampleCounts,
    read_data_args,
    read_per_split_data_args,
    sample_counts,
)
from tests.data.corpora import EOD, GOLDEN, VOCAB

ANSWERS = json.loads((GOLDEN / "orders.json").read_text())


def digest(dataset, samples: int) -> str:
    sha = hashlib.sha256()
    for index in range(samples):
        sha.update(dataset[index].astype("<i8").tobytes())
    return sha.hexdigest()


def placed(entries) -> tuple[str, ...]:
    return tuple(str(GOLDEN / entry) if entry in ("a", "b", "c") else entry for entry in entries or ())


def settings_of(case, cache: Path) -> DataSettings:
    common = {"seq_length": case["seq_length"], "seed": case["seed"], "data_cache_path": cache}
    if case["data_path"]:
        return DataSettings(data_path=placed(case["data_path"]), split=case["split"], **common)
    train, valid, test = (placed(paths) for paths in case["per_split"])
    return DataSettings(train_data_path=train, valid_data_path=valid, test_data_path=test, **common)


@pytest.mark.parametrize("case", ANSWERS["orders"], ids=lambda case: f"{case['data_path']}-{case['seq_length']}")
def test_orders_are_megatrons(case, tmp_path):
    asked = case["asked"]
    for _ in ("built", "from the cache"):
        built = build_datasets(
            settings_of(case, tmp_path),
            SampleCounts(train=asked[0], valid=asked[1], test=asked[2]),
            vocab_size=VOCAB,
            eod=EOD,
            report=lambda line: None,
        )
        for wanted, dataset, answer in zip(
            asked, (built.train, built.valid, built.test), case["datasets"], strict=True
        ):
            if wanted == 0 or answer is None:
                assert dataset is None
                continue
            assert len(dataset) >= answer["samples"]
            assert digest(dataset, answer["samples"]) == answer["sha256"]


@pytest.mark.parametrize("number", range(4))
def test_index_arrays_are_megatrons(number):
    golden = np.load(GOLDEN / "index_arrays.npz")
    samples, seq_length, seed = golden[f"case{number}"].tolist()
    source = IndexedDataset(GOLDEN / "a")
    request = SampleRequest(first=0, last=len(source), num_samples=samples, seq_length=seq_length, seed=seed)
    index = GPTDataset(source, request, vocab_size=VOCAB, cache=None).index
    for ours, theirs in (("documents", "documents"), ("samples", "samples"), ("shuffle", "shuffle")):
        expected = golden[f"{theirs}{number}"]
        assert getattr(index, ours).dtype == expected.dtype
        assert np.array_equal(getattr(index, ours), expected)


@pytest.mark.parametrize("case", ANSWERS["mock"], ids=lambda case: str(case["seq_length"]))
def test_mock_data_is_megatrons(case):
    settings = DataSettings(mock_data=True, seq_length=case["seq_length"], seed=case["seed"])
    counts = SampleCounts(train=case["asked"], valid=case["asked"], test=case["asked"])
    built = build_datasets(settings, counts, vocab_size=VOCAB, eod=EOD, report=lambda line: None)
    for dataset, answer, length in zip(
        (built.train, built.valid, built.test), case["datasets"], case["lengths"], strict=True
    ):
        assert len(dataset) == length
        assert digest(dataset, case["asked"]) == answer["sha256"]


def plain_plan(tokens: int, seq_length: int, samples: int) -> tuple[int, bool, int]:
    """The rule as Megatron-DeepSpeed states it: count epochs until they hold the samples."""
    epochs = 1
    while (epochs * tokens - 1) // seq_length < samples:
        epochs += 1
    before = ((epochs - 1) * tokens - 1) // seq_length
    separate = epochs > 1 and samples - before < int(0.80 * ((tokens - 1) // seq_length))
    return epochs, separate, before


def test_both_published_epoch_rules_agree_with_the_plan():
    for tokens in (7, 8, 9, 33, 100):
        for seq_length in (1, 4, 8, 9, 50):
            for samples in range(1, 60):
                plan = plan_epochs(tokens, seq_length, samples)
                epochs, separate, before = plain_plan(tokens, seq_length, samples)
                assert (plan.epochs, plan.separate_last_epoch) == (epochs, separate)
                assert not separate or plan.first_group == before
                # Megatron Core: the first number of epochs with samples * seq_length + 1 tokens.
                assert plan.epochs == min(e for e in range(1, 5000) if e * tokens >= samples * seq_length + 1)


def test_exact_epochs_are_obeyed_or_refused():
    assert plan_epochs(100, 10, 15, exact_epochs=2).epochs == 2
    assert plan_epochs(100, 10, 9, exact_epochs=1).epochs == 1
    with pytest.raises(DataError, match="gives 0 to 9 samples, but 15"):
        plan_epochs(100, 10, 15, exact_epochs=1)
    with pytest.raises(DataError, match="gives 19 to 29 samples, but 15"):
        plan_epochs(100, 10, 15, exact_epochs=3)
    with pytest.raises(DataError, match="too few"):
        plan_epochs(10, 10, None)


def test_counts_are_megatrons():
    counts = sample_counts(1000, train_iters=100, eval_interval=30, eval_iters=5, global_batch_size=10)
    assert counts == SampleCounts(train=1000, valid=4 * 50, test=50)
    everything = sample_counts(1000, train_iters=100, eval_interval=30, eval_iters=-1, global_batch_size=10)
    assert everything == SampleCounts(train=1000, valid=None, test=None)
    with pytest.raises(DataError, match="--eval-iters is -2"):
        sample_counts(1, train_iters=1, eval_interval=1, eval_iters=-2, global_batch_size=1)


def test_not_enough_data_and_empty_splits_are_named(tmp_path):
    def build(data_path, split, **counts):
        settings = DataSettings(
            data_path=placed(data_path), split=split, seq_length=16, seed=1, data_cache_path=tmp_path
        )
        lines = []
        wanted = SampleCounts(**{"train": 1, "valid": 0, "test": 0, **counts})
        return build_datasets(settings, wanted, vocab_size=VOCAB, eod=EOD, report=lines.append), lines

    with pytest.raises(DataError, match=r"has 366 samples.*but 400"):
        build(["a", "b", "c"], "1", train=400)
    with pytest.raises(DataError, match=r"repeats some"):
        build(["1", "a", "1", "b"], "1,1,0", valid=None)
    with pytest.raises(DataError, match=r"outside of the vocabulary of 10"):
        build_datasets(
            DataSettings(data_path=placed(["a"]), seq_length=16, seed=1, data_cache_path=tmp_path),
            SampleCounts(train=1, valid=0, test=0),
            vocab_size=10,
            eod=EOD,
            report=print,
        )
    built, lines = build(["c"], "90,1,9", valid=5)
    assert built.valid is None
    assert any("no valid data" in line for line in lines)


def test_settings_take_the_data_in_one_way():
    with pytest.raises(DataError, match="exactly one way"):
        DataSettings(seq_length=8, seed=1)
    with pytest.raises(DataError, match="exactly one way"):
        DataSettings(seq_length=8, seed=1, data_path=("a",), mock_data=True)
    with pytest.raises(DataError, match="--train-data-path, which is missing"):
        DataSettings(seq_length=8, seed=1, valid_data_path=("a",))


def test_blends_can_stand_in_files(tmp_path):
    path = tmp_path / "data"
    path.write_text("0.3 a\n0.7 b\n")
    assert read_data_args(path) == ("0.3", "a", "0.7", "b")
    path.write_text('{"train": [1, "a", 2, "b"], "test": ["c"], "valid": null}')
    assert read_per_split_data_args(path) == (("1", "a", "2", "b"), (), ("c",))
    for content, message in (("", "is not JSON"), ('{"validation": []}', "keys train"), ('{"train": "a"}', "a list")):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_per_split_data_args(path)
    with pytest.raises(DataError, match="is empty"):
        path.write_text(" ")
        read_data_args(path)
    with pytest.raises(DataError, match="--data-args-path"):
        read_data_args(tmp_path / "missing")
