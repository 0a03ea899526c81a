"""From datasets to streams of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from megatron.data.batch import Batch, MaskRules, make_batch, mix_seed, own_tokens
from megatron.data.blend import Samples
from megatron.data.datasets import Fim, build_datasets
from megatron.data.errors import DataError
from megatron.data.instruction import InstructionRules, instruction_batch
from megatron.data.samplers import PADDING, CyclicSampler, SampleRef, SequentialSampler, ShardedCyclicSampler, Share
from megatron.data.settings import DataSettings, SampleCounts
from megatron.mpu.context import WHOLE, SequencePart


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How micro-batches are made on one rank.

    Attributes:
        share: the part of the stream that this data-parallel rank reads. Ranks that differ only in their tensor-,
            context- or pipeline-parallel place pass the same share and read the same data; nothing is broadcast.
        rules: what EOD does.
        seed: of the run; dropout seeds derive from it.
        num_workers: processes that read ahead; 0 reads in this process.
        pin_memory: page-locked batches, where the device copies from them faster.
        instruction: how samples of instruction data are filled up to `seq_length`; None for pretraining data.
        seq_length: see `instruction`.
        part: the tokens of every sequence that this rank trains on.
    """

    share: Share
    rules: MaskRules
    seed: int
    num_workers: int = 0
    pin_memory: bool = False
    instruction: InstructionRules | None = None
    seq_length: int = 0
    part: SequencePart = WHOLE


class BatchStream:
    """Iterator over the micro-batches of one rank.

    `next` goes on where the last one stopped. A stream over a whole pass ends with StopIteration after the same number
    of micro-batches on every rank, the last ones filled up with masked samples; `rewind` starts it again.
    """

    def __init__(self, dataset: Samples, sampler: _Sampler, options: LoaderOptions) -> None:
        self.num_samples = len(dataset)
        self._loader = _loader(dataset, sampler, options)
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._loader)
        return next(self._batches)

    def rewind(self) -> None:
        """Begin again where the stream began."""
        self._batches = None


@dataclass(frozen=True, kw_only=True)
class DataIterators:
    """The streams of one rank; None where a split has no data or none is wanted."""

    train: BatchStream | None
    valid: BatchStream | None
    test: BatchStream | None


@dataclass(frozen=True, kw_only=True)
class Consumed:
    """Samples that a run has taken so far, over all ranks; what a checkpoint records."""

    train: int = 0
    valid: int = 0


def build_data_iterators(
    settings: DataSettings,
    counts: SampleCounts,
    *,
    share: Share,
    vocab_size: int,
    eod: int,
    consumed: Consumed = Consumed(),
    pin_memory: bool = False,
    report: Callable[[str], None] = lambda line: None,
    fim: Fim | None = None,
    part: SequencePart = WHOLE,
) -> DataIterators:
    """Everything from settings to micro-batches. With torch.distributed, all ranks must call it.

    Args:
        settings: where the data is and how it is read.
        counts: samples of each split; where it says None, `rewind` starts another pass over all of them.
        share: part of this data-parallel rank.
        vocab_size: token ids outside of it are refused.
        eod: end-of-document token.
        consumed: where to go on.
        pin_memory: page-locked batches.
        report: receives lines for the log.
        fim: see `build_datasets`.
        part: the tokens of every sequence that this rank trains on.

    Raises:
        DataError: the data cannot be used; on every rank, also when only one of them found out.
    """
    rules = MaskRules(
        eod=eod,
        reset_position_ids=settings.reset_position_ids,
        reset_attention_mask=settings.reset_attention_mask,
        eod_mask_loss=settings.eod_mask_loss,
        pad=None if fim is None else fim[1].pad,
    )
    options = LoaderOptions(
        share=share,
        rules=rules,
        seed=settings.seed,
        num_workers=settings.num_workers,
        pin_memory=pin_memory,
        instruction=settings.instruction,
        seq_length=settings.seq_length,
        part=part,
    )
    with _Agreement():
        datasets = build_datasets(settings, counts, vocab_size=vocab_size, eod=eod, report=report, fim=fim)
        return DataIterators(
            train=_train_stream(settings, datasets.train, consumed.train, options),
            valid=_eval_stream(datasets.valid, counts.valid, consumed.valid, options),
            test=_eval_stream(datasets.test, counts.test, 0, options),
        )


_Sampler = SequentialSampler | CyclicSampler | ShardedCyclicSampler


def _train_stream(
    settings: DataSettings, dataset: Samples | None, start: int, options: LoaderOptions
) -> BatchStream | None:
    if dataset is None:
        return None
    kind: type[_Sampler] = SequentialSampler
    if settings.dataloader_type == "cyclic":
        kind = ShardedCyclicSampler if settings.data_sharding else CyclicSampler
    return BatchStream(dataset, kind(total=len(dataset), start=start, share=options.share), options)


def _eval_stream(dataset: Samples | None, wanted: int | None, start: int, options: LoaderOptions) -> BatchStream | None:
    if dataset is None:
        return None
    everything = wanted is None
    sampler = SequentialSampler(
        total=len(dataset), start=0 if everything else start, share=options.share, fill_last=everything
    )
    return BatchStream(dataset, sampler, options)


class _Agreement:
    """A block that fails on every rank when it fails on one, instead of leaving the others to wait for it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        prepared = [True] * dist.get_world_size()
        dist.all_gather_object(prepared, error is None)
        failed = prepared.count(False)
        if error is None and failed:
            raise DataError(f"The data could not be prepared on {failed} other rank(s); see their messages.")


@dataclass(frozen=True)
class _Positioned:
    """A dataset that is asked by place in the stream and gives the place back with the tokens."""

    dataset: Samples

    def __getitem__(self, ref: SampleRef) -> tuple[SampleRef, Any]:
        return ref, self.dataset[0 if ref.index == PADDING else ref.index]


@dataclass(frozen=True)
class _Collate:
    options: LoaderOptions

    def __call__(self, items: Sequence[tuple[SampleRef, Any]]) -> Batch:
        options = self.options
        samples = [sample for _, sample in items]
        real = np.array([ref.index != PADDING for ref, _ in items])
        seed = mix_seed(options.seed, items[0][0].position)
        if options.instruction is not None:
            batch = instruction_batch(samples, real, options.instruction, options.seq_length, seed)
        else:
            batch = make_batch(np.stack(samples), real, options.rules, seed)
        return own_tokens(batch, options.part)


def _loader(dataset: Samples, sampler: _Sampler, options: LoaderOptions) -> DataLoader[Any]:
    positioned: Any = _Positioned(dataset)
    batches: Any = sampler
    return DataLoader(
        positioned,
        batch_sampler=batches,
        collate_fn=_Collate(options),
        num_workers=options.num_workers,
        pin_memory=options.pin_memory,
        worker_init_fn=_one_thread if options.num_workers else None,
        persistent_workers=options.num_workers > 0,
    )


def _one_thread(worker: int) -> None:
    """Workers only copy tokens; more threads would take processors from the training process."""
    torch.set_num_threads(1)
