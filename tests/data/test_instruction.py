"""Instruction data: what is learned, splits, packing, padding; packed and unpacked examples have the same loss."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.accelerators import select
from megatron.config.architecture import Architecture
from megatron.data.errors import DataError
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.instruction import (
    IGNORED,
    InstructionDataset,
    InstructionRequest,
    InstructionRules,
    InstructionSource,
    instruction_batch,
)
from megatron.data.loader import build_data_iterators
from megatron.data.packing import best_fit, order_examples
from megatron.data.samplers import Share
from megatron.data.settings import DataSettings, SampleCounts
from megatron.model.gpt import GPT
from megatron.model.inputs import ModelInputs
from megatron.mpu.groups import single_process
from megatron.ops import build_table

VOCAB, PAD, SEQ = 60, 59, 32
Example = list[tuple[list[int], bool]]
# Two float32 sums over the same terms, one of them with other terms between that are exactly zero.
SAME = 2e-5


def _examples(number: int, seed: int = 0, longest: int = 12) -> list[Example]:
    """Each token of example i is unique to it as long as there are few of them."""
    rng = random.Random(seed)
    return [
        [
            ([rng.randrange(1, 58) for _ in range(rng.randrange(1, longest))], turn % 2 == 1)
            for turn in range(2 * rng.randrange(1, 3))
        ]
        for _ in range(number)
    ]


def write_packed(prefix: Path, examples: list[Example]) -> str:
    parts = {name: [] for name in ("input_ids", "attention_mask", "labels")}  # type: ignore[var-annotated]
    for example in examples:
        parts["input_ids"].append([token for run, _ in example for token in run])
        parts["attention_mask"].append([1 for run, _ in example for _ in run])
        parts["labels"].append([token if learn else IGNORED for run, learn in example for token in run])
    for name, rows in parts.items():
        with IndexedDatasetWriter(f"{prefix}_packed_{name}_document", np.int32) as writer:
            for row in rows:
                writer.add_document(row)
    return str(prefix)


def write_compact(prefix: Path, examples: list[Example]) -> str:
    with IndexedDatasetWriter(f"{prefix}_dialogue_document", np.uint16) as writer:
        for example in examples:
            writer.add_document([t for run, _ in example for t in run], [len(run) for run, _ in example])
    return str(prefix)


def _dataset(prefix: str, **changes: object) -> InstructionDataset:
    source = InstructionSource(prefix)
    wanted = {"first": 0, "last": len(source.lengths), "num_samples": None, "seq_length": SEQ, "seed": 3, "pack": False}
    request = InstructionRequest(**{**wanted, **changes})  # type: ignore[arg-type]
    return InstructionDataset(source, request, vocab_size=VOCAB, cache=None)


def test_both_forms_read_the_same(tmp_path: Path) -> None:
    examples = _examples(50)
    packed, compact = (
        InstructionSource(write(tmp_path / name, examples))
        for name, write in (("p", write_packed), ("c", write_compact))
    )
    assert packed.lengths.tolist() == compact.lengths.tolist()
    assert packed.first_learned.tolist() == compact.first_learned.tolist()
    for number, example in enumerate(examples):
        ids, labels = packed.read(number)
        assert ids.tolist() == [token for run, _ in example for token in run]
        assert labels.tolist() == [token if learn else IGNORED for run, learn in example for token in run]
        for ours, theirs in zip(packed.read(number), compact.read(number), strict=True):
            assert ours.tolist() == theirs.tolist()
    assert pickle.loads(pickle.dumps(packed)).lengths.tolist() == packed.lengths.tolist()
    assert len(pickle.dumps(packed)) < 500


def test_first_learned_against_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [np.where(rng.random(n) < 0.2, 5, IGNORED) for n in rng.integers(0, 9, 400)]
    examples: list[Example] = [[([5], bool(value != IGNORED)) for value in row] for row in labels]
    source = InstructionSource(write_packed(tmp_path / "p", examples))
    for row, first in zip(labels, source.first_learned.tolist(), strict=True):
        assert first == next((i for i in range(1, len(row)) if row[i] != IGNORED), len(row))


def test_every_example_once_and_none_of_another_split(tmp_path: Path) -> None:
    examples: list[Example] = [[([number % 50 + 1, number // 50 + 1], False), ([7, 8], True)] for number in range(200)]
    prefix = write_compact(tmp_path / "c", examples)
    settings = DataSettings(
        seq_length=SEQ, seed=1, data_path=(prefix,), split="70,20,10", num_workers=0,
        instruction=InstructionRules(pad=PAD), data_cache_path=tmp_path / "cache",
    )  # fmt: skip
    counts = SampleCounts(train=140, valid=40, test=20)
    streams = build_data_iterators(settings, counts, share=Share(micro_batch_size=10), vocab_size=VOCAB, eod=0)
    seen = []
    for stream, steps in ((streams.train, 14), (streams.valid, 4), (streams.test, 2)):
        assert stream is not None
        batches = [next(stream) for _ in range(steps)]
        rows = torch.cat([batch.tokens[:, :2] for batch in batches]).tolist()
        seen.append({(second - 1) * 50 + first - 1 for first, second in rows})
    assert seen == [set(range(140)), set(range(140, 180)), set(range(180, 200))]


def test_only_answers_are_learned_and_the_rest_is_padding(tmp_path: Path) -> None:
    examples: list[Example] = [[([1, 2, 3], False), ([4, 5], True), ([6], False), ([7], True)]]
    dataset = _dataset(write_packed(tmp_path / "p", examples), seq_length=8)
    batch = instruction_batch([dataset[0]], np.array([True]), InstructionRules(pad=PAD), 8, 5)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, PAD, PAD]]
    assert batch.labels.tolist() == [[0, 0, 4, 5, 0, 7, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1, 0, 1, 0, 0]]
    assert batch.position_ids is None
    assert batch.document_ids is None
    assert batch.dropout_seed == 5
    unused = instruction_batch([dataset[0]], np.array([False]), InstructionRules(pad=PAD), 8, 5)
    assert unused.loss_mask.sum() == 0


def test_padding_to_the_longest(tmp_path: Path) -> None:
    dataset = _dataset(
        write_compact(tmp_path / "c", [[([1] * 4, False), ([2] * 7, True)], [([3], False), ([4], True)]])
    )
    rules = InstructionRules(pad=PAD, pad_to_longest=True, multiple=4)
    batch = instruction_batch([dataset[0], dataset[1]], np.array([True, True]), rules, SEQ, 0)
    assert batch.tokens.shape == (2, 12)
    assert instruction_batch([dataset[0]], np.array([True]), rules, 10, 0).tokens.shape[1] <= 12


def test_examples_without_answers_in_reach_are_left_out_and_counted(tmp_path: Path) -> None:
    examples: list[Example] = [
        [([1] * 9, False), ([2], True)],
        [([1], False), ([2] * 20, True)],
        [([1], False), ([2], True)],
    ]
    source = InstructionSource(write_packed(tmp_path / "p", examples))
    request = InstructionRequest(first=0, last=3, num_samples=None, seq_length=8, seed=0, pack=False)
    said: list[str] = []
    dataset = InstructionDataset(source, request, vocab_size=VOCAB, cache=None, report=said.append)
    assert len(dataset) == 2
    assert f"1 of 3 examples of {source.name} are left out: no answer begins within --seq-length 8" in said
    assert f"1 of 3 examples of {source.name} are cut at --seq-length 8" in said
    assert sorted(len(dataset[i].tokens) for i in range(2)) == [1, 8]
    with pytest.raises(DataError, match=r"None of the 1 examples .* has an answer within --seq-length 8"):
        InstructionDataset(source, InstructionRequest(**{**vars(request), "last": 1}), vocab_size=VOCAB, cache=None)


def test_packing_is_tight_and_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 65, 3000)
    packs = best_fit(sizes, 64)
    fill = np.bincount(packs, sizes)
    assert fill.max() <= 64
    # The plain twin: look at all open packs for the fullest that takes the item.
    spaces: list[int] = []
    for size, pack in zip(sizes[:400].tolist(), packs[:400].tolist(), strict=True):
        fitting = [space for space in spaces if space >= size]
        if fitting:
            assert spaces[pack] == min(fitting)
            spaces[pack] -= size
        else:
            assert pack == len(spaces)
            spaces.append(64 - size)
    order = order_examples(sizes, wanted=None, capacity=64, seed=1, first=10)
    assert sorted(order.examples.tolist()) == list(range(10, 3010))
    assert sizes.sum() / (len(order) * 64) > 0.97
    for start, end in zip(order.starts[:-1], order.starts[1:], strict=True):
        assert 0 < sizes[order.examples[start:end] - 10].sum() <= 64


@pytest.mark.parametrize("capacity", [None, 64])
def test_more_samples_take_more_passes(capacity: int | None) -> None:
    sizes = np.array([0, 10, 20, 0, 40])
    packs = order_examples(sizes, wanted=7, capacity=capacity, seed=4)
    assert len(packs) >= 7
    assert set(packs.examples.tolist()) == {1, 2, 4}
    counts = np.bincount(packs.examples)[[1, 2, 4]]
    assert counts.max() == counts.min()


def _model(position: str) -> GPT:
    arch = Architecture(
        num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_hidden_size=48,
        vocab_size=VOCAB, padded_vocab_size=64, max_positions=SEQ, position=position,  # type: ignore[arg-type]
    )  # fmt: skip
    ops, _ = build_table(select("cpu"), {})
    torch.manual_seed(0)
    model = GPT(arch, ops=ops, groups=single_process())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _losses(model: GPT, dataset: InstructionDataset, rules: InstructionRules) -> dict[int, float]:
    """The loss of each example, summed over its learned tokens."""
    losses: dict[int, float] = {}
    for index in range(len(dataset)):
        batch = instruction_batch([dataset[index]], np.array([True]), rules, SEQ, 0)
        inputs = ModelInputs(position_ids=batch.position_ids, document_ids=batch.document_ids)
        with torch.no_grad():
            logits = model(batch.tokens, inputs)[:, 0, :VOCAB].float()
        tokens = torch.nn.functional.cross_entropy(logits, batch.labels[0], reduction="none") * batch.loss_mask[0]
        place = 0
        start, end = dataset.packs.starts[index : index + 2].tolist()
        for example, size in zip(dataset.packs.examples[start:end].tolist(), dataset[index].lengths, strict=True):
            losses[example] = float(tokens[place : place + size].sum())
            place += size
    return losses


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_packed_and_unpacked_examples_have_the_same_loss(tmp_path: Path, position: str) -> None:
    prefix = write_compact(tmp_path / "c", _examples(30, seed=2, longest=6))
    model = _model(position)
    alone = _losses(model, _dataset(prefix), InstructionRules(pad=PAD))
    packed_data = _dataset(prefix, pack=True)
    assert len(packed_data) < 20
    packed = _losses(model, packed_data, InstructionRules(pad=PAD, pack=True))
    assert alone.keys() == packed.keys() == set(range(30))
    for example, loss in alone.items():
        assert loss > 0
        assert packed[example] == pytest.approx(loss, rel=SAME)
    joined = _losses(model, packed_data, InstructionRules(pad=PAD))
    assert any(abs(joined[example] - loss) > 100 * SAME * loss for example, loss in alone.items())


def test_data_that_is_not_instruction_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no instruction data: there is neither"):
        InstructionSource(str(tmp_path / "none"))
    prefix = write_packed(tmp_path / "p", _examples(5))
    with IndexedDatasetWriter(f"{prefix}_packed_labels_document", np.int32) as writer:
        writer.add_document([1])
    with pytest.raises(DataError, match="differ in the lengths of their documents"):
        InstructionSource(prefix)
    prefix = write_packed(tmp_path / "q", [[([1], False), ([2, 3], True)]] * 3)
    with IndexedDatasetWriter(f"{prefix}_packed_attention_mask_document", np.int32) as writer:
        for row in ([1, 1, 1], [1, 0, 1], [1, 1, 1]):
            writer.add_document(row)
    with pytest.raises(DataError, match="document 1 hides tokens"):
        InstructionSource(prefix)
    prefix = write_compact(tmp_path / "c", [[([1], False), ([VOCAB], True)]])
    with pytest.raises(DataError, match=f"Token id {VOCAB} in example 0"):
        _dataset(prefix)[0]
    rules = InstructionRules(pad=0)
    with pytest.raises(DataError, match="--mock-data has none"):
        DataSettings(seq_length=8, seed=0, mock_data=True, instruction=rules)
    with pytest.raises(DataError, match="are for pretraining data"):
        DataSettings(seq_length=8, seed=0, data_path=("a",), eod_mask_loss=True, instruction=rules)
