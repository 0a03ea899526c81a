"""Instruction data: prompts that are only read, answers that are learned.

Two forms are read, both written by tools/preprocess_data.py: AscendSpeed's three datasets
`{prefix}_packed_{input_ids,attention_mask,labels}_document`, and `{prefix}_dialogue_document`, whose documents are
sequences that are in turn a prompt and an answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron.data.batch import Batch
from megatron.data.errors import DataError
from megatron.data.index_cache import IndexCache, load_array
from megatron.data.indexed_dataset import IndexedDataset, Tokens, check_tokens, idx_path
from megatron.data.packing import Packs, order_examples

IGNORED = -100
_PIECE = 1 << 22
_PARTS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True, kw_only=True)
class InstructionRules:
    """How examples become samples.

    Attributes:
        pad: token that fills a sample up; its loss is masked.
        pack: several examples share a sample, and neither see each other nor count each other's positions.
        pad_to_longest: batches are as long as their longest sample, rounded up to `multiple`, not `seq_length`.
        multiple: what the length of a batch must be a multiple of.
    """

    pad: int
    pack: bool = False
    pad_to_longest: bool = False
    multiple: int = 8


@dataclass(frozen=True)
class InstructionSample:
    """Examples of one sample: `tokens` [n] and the `labels` [n] they predict, `lengths` [examples] in positions."""

    tokens: Tokens
    labels: Tokens
    lengths: tuple[int, ...]


class InstructionSource:
    """The examples of one prefix.

    Attributes:
        name: the prefix.
        lengths: [examples] tokens of each, prompt and answer.
        first_learned: [examples] place of the first token that is learned, at least 1 since nothing predicts the first;
            beyond the example if there is none.

    Raises:
        DataError: the datasets are missing, damaged, or do not fit together.
    """

    def __init__(self, prefix: str) -> None:
        self.name = prefix
        self._dialogues: IndexedDataset | None = None
        if idx_path(f"{prefix}_dialogue_document").exists():
            self._dialogues = IndexedDataset(f"{prefix}_dialogue_document")
            self.lengths, self.first_learned = _measure_dialogues(self._dialogues)
            return
        if not idx_path(f"{prefix}_packed_input_ids_document").exists():
            raise DataError(
                f"{prefix} is no instruction data: there is neither {prefix}_packed_input_ids_document.idx nor "
                f"{prefix}_dialogue_document.idx. Give the prefix without these ends; write it with "
                "tools/preprocess_data.py --handler-name, or leave out --is-instruction-dataset"
            )
        self._ids, mask, self._labels = (IndexedDataset(f"{prefix}_packed_{part}_document") for part in _PARTS)
        for part in (mask, self._labels):
            if not np.array_equal(part.lengths, self._ids.lengths):
                raise DataError(f"{part.prefix} and {self._ids.prefix} differ in the lengths of their documents")
        self.lengths, self.first_learned = _measure_packed(self._ids, mask, self._labels)

    def __reduce__(self) -> tuple[type[InstructionSource], tuple[str]]:
        return InstructionSource, (self.name,)

    def fingerprint(self) -> str:
        """A hash of what the order of samples depends on."""
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths).data)
        digest.update(np.ascontiguousarray(self.first_learned).data)
        return digest.hexdigest()

    def read(self, example: int) -> tuple[Tokens, Tokens]:
        """Ids and labels of one example, the labels not moved, prompts as -100."""
        if self._dialogues is None:
            return self._ids[example].astype(np.int64), self._labels[example].astype(np.int64)
        first, last = self._dialogues.index.documents[example : example + 2].tolist()
        runs = [self._dialogues[sequence].astype(np.int64) for sequence in range(first, last)]
        ids = np.concatenate(runs) if runs else np.empty(0, np.int64)
        learned = np.repeat(np.arange(len(runs)) % 2 == 1, [len(run) for run in runs])
        return ids, np.where(learned, ids, IGNORED)


def _measure_dialogues(data: IndexedDataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    totals = np.concatenate(([0], np.cumsum(data.lengths, dtype=np.int64)))
    documents = data.index.documents
    lengths = totals[documents[1:]] - totals[documents[:-1]]
    prompts = np.zeros(len(lengths), np.int64)
    filled = documents[1:] > documents[:-1]
    prompts[filled] = data.lengths[documents[:-1][filled]]
    return lengths, np.maximum(prompts, 1)


def _measure_packed(
    ids: IndexedDataset, mask: IndexedDataset, labels: IndexedDataset
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    lengths = ids.lengths.astype(np.int64)
    first = lengths.copy()
    ends = np.cumsum(lengths)
    begin = 0
    while begin < len(lengths):
        # As many examples as make a piece of work, at least one.
        before = ends[begin] - lengths[begin]
        end = max(begin + 1, int(np.searchsorted(ends, before + _PIECE, "right")))
        size = int(ends[end - 1] - before)
        hidden = mask.read(begin, 0, size) == 0
        if hidden.any():
            example = begin + int(np.searchsorted(ends[begin:end] - before, np.argmax(hidden), "right"))
            raise DataError(f"{mask.prefix}: document {example} hides tokens; only whole examples can be read")
        first[begin:end] = _first_learned(labels.read(begin, 0, size) != IGNORED, lengths[begin:end])
        begin = end
    return lengths, first


def _first_learned(learned: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The place of the first learned token of each example, not counting its first token; its length if none."""
    starts = np.cumsum(lengths) - lengths
    learned[starts[lengths > 0]] = False
    places = np.append(np.flatnonzero(learned), len(learned))
    return np.minimum(places[np.searchsorted(places, starts)] - starts, lengths)


@dataclass(frozen=True, kw_only=True)
class InstructionRequest:
    """Which samples are wanted of a source: as `gpt_dataset.SampleRequest`, of the examples `first` to `last`."""

    first: int
    last: int
    num_samples: int | None
    seq_length: int
    seed: int
    pack: bool


class InstructionDataset:
    """Samples of one source.

    Args:
        source: the examples.
        request: which samples.
        vocab_size: tokens outside of it are refused when a sample is read.
        cache: where the order is kept between runs; None builds it in memory.
        report: receives what was cut or left out.

    Raises:
        DataError: no example in the range has anything to learn.
    """

    def __init__(
        self,
        source: InstructionSource,
        request: InstructionRequest,
        *,
        vocab_size: int,
        cache: IndexCache | None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.source = source
        self.seq_length = request.seq_length
        self.vocab_size = vocab_size
        self.packs = _packs(source, request, cache, report)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> InstructionSample:
        """The examples of sample `index`, one after the other.

        Raises:
            IndexError: beyond the last sample.
            DataError: a token outside of the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.source.name}, which has {len(self)}")
        tokens, labels = [], []
        for example in self.packs.examples[self.packs.starts[index] : self.packs.starts[index + 1]].tolist():
            ids, targets = self.source.read(example)
            tokens.append(ids[: self.seq_length + 1][:-1])
            labels.append(targets[1 : self.seq_length + 1])
            check_tokens(ids, self.vocab_size, f"example {example} of {self.source.name}")
        return InstructionSample(np.concatenate(tokens), np.concatenate(labels), tuple(map(len, tokens)))


def _packs(
    source: InstructionSource, request: InstructionRequest, cache: IndexCache | None, report: Callable[[str], None]
) -> Packs:
    lengths = source.lengths[request.first : request.last]
    learned = source.first_learned[request.first : request.last]
    sizes = np.minimum(lengths - 1, request.seq_length)
    useful = learned <= sizes
    where = f"{len(lengths)} examples of {source.name}"
    if not useful.any():
        raise DataError(
            f"None of the {where} has an answer within --seq-length {request.seq_length}; raise it, or see --split."
        )
    if not useful.all():
        report(f"{(~useful).sum()} of {where} are left out: no answer begins within --seq-length {request.seq_length}")
    cut = int((useful & (lengths - 1 > request.seq_length)).sum())
    if cut:
        report(f"{cut} of {where} are cut at --seq-length {request.seq_length}")

    def build() -> Packs:
        return order_examples(
            np.where(useful, sizes, 0),
            wanted=request.num_samples,
            capacity=request.seq_length if request.pack else None,
            seed=request.seed,
            first=request.first,
        )

    if cache is None:
        return build()
    key = {
        "source": source.fingerprint(),
        "range": [request.first, request.last],
        "seq_length": request.seq_length,
        "seed": request.seed,
        "samples": request.num_samples,
        "pack": request.pack,
    }
    paths = cache.load_or_build("examples", key, lambda: vars(build()))
    return Packs(load_array(paths["examples"]), load_array(paths["starts"]))


def instruction_batch(
    samples: Sequence[InstructionSample],
    real: npt.NDArray[np.bool_],
    rules: InstructionRules,
    seq_length: int,
    dropout_seed: int,
) -> Batch:
    """A micro-batch of instruction samples.

    Args:
        samples: [b].
        real: [b]; a sample that only fills the batch up has a loss mask of zeros.
        rules: how it is filled up.
        seq_length: longest sample.
        dropout_seed: passed on.
    """
    width = seq_length
    if rules.pad_to_longest:
        longest = max(len(sample.tokens) for sample in samples)
        width = min(seq_length, -(-longest // rules.multiple) * rules.multiple)
    shape = (len(samples), width)
    tokens, labels = np.full(shape, rules.pad, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.tile(np.arange(width), (len(samples), 1))
    documents = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        size = len(sample.tokens)
        tokens[row, :size], labels[row, :size] = sample.tokens, sample.labels
        lengths = np.array([*sample.lengths, width - size])
        documents[row] = np.repeat(np.arange(len(lengths)), lengths)
        positions[row] -= np.repeat(np.cumsum(lengths) - lengths, lengths)
    learned = (labels != IGNORED) & real[:, None]
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(np.where(learned, labels, 0)),
        loss_mask=torch.from_numpy(learned.astype(np.float32)),
        # Without packing the padding is behind everything, where causal attention does not look.
        position_ids=torch.from_numpy(positions) if rules.pack else None,
        document_ids=torch.from_numpy(documents) if rules.pack else None,
        dropout_seed=dropout_seed,
    )
