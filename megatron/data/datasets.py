"""From settings to the train, valid and test datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.data import mock
from megatron.data.blend import (
    SPLITS,
    Blend,
    Samples,
    blend_all,
    blend_by_weight,
    dataset_sizes,
    parse_blend,
    parse_split,
    split_range,
)
from megatron.data.errors import DataError
from megatron.data.fim import Codec, FimDataset, FimSettings, FimTokens
from megatron.data.gpt_dataset import GPTDataset, SampleRequest
from megatron.data.index_cache import IndexCache
from megatron.data.indexed_dataset import IndexedDataset, TokenSource
from megatron.data.instruction import InstructionDataset, InstructionRequest, InstructionSource
from megatron.data.remote import RemoteDataset, is_remote
from megatron.data.settings import DataSettings, SampleCounts

_WHOLE = (0.0, 1.0)
Fim = tuple[FimSettings, FimTokens, Codec]
_CACHE_FOLDER = "index-cache"


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """The samples of each split; None where none are wanted or the split is empty."""

    train: Samples | None
    valid: Samples | None
    test: Samples | None


def build_datasets(
    settings: DataSettings,
    counts: SampleCounts,
    *,
    vocab_size: int,
    eod: int,
    report: Callable[[str], None],
    fim: Fim | None = None,
) -> Datasets:
    """Open the corpora and build or load the order of their samples.

    Args:
        settings: where and how.
        counts: how many samples of each split.
        vocab_size: token ids outside of it are refused.
        eod: token that ends the made-up documents of --mock-data.
        report: receives lines for the log.
        fim: how training documents are rearranged; None leaves them as they are.

    Raises:
        DataError: data is missing, damaged, made with another tokenizer, or not enough.
    """
    builder = _Builder(settings, vocab_size, eod, report, fim)
    built = {
        name: builder.split(number, wanted)
        for number, (name, wanted) in enumerate(zip(SPLITS, (counts.train, counts.valid, counts.test), strict=True))
    }
    return Datasets(train=built["train"], valid=built["valid"], test=built["test"])


class _Builder:
    def __init__(
        self, settings: DataSettings, vocab_size: int, eod: int, report: Callable[[str], None], fim: Fim | None
    ) -> None:
        self.settings = settings
        self.vocab_size = vocab_size
        self.eod = eod
        self.report = report
        self.fim = fim
        self.sources: dict[str, TokenSource | InstructionSource] = {}

    def split(self, number: int, wanted: int | None) -> Samples | None:
        """The dataset of one split, with at least `wanted` samples."""
        part, blend = self._part(number)
        if wanted == 0 or part is None:
            return None
        cache = self._cache(blend)
        if blend is None or (len(blend.prefixes) == 1 and (blend.weights is None or not self.settings.data_path)):
            prefix = "" if blend is None else blend.prefixes[0]
            dataset: Samples | None = self._single(prefix, part, wanted, number, cache)
        else:
            dataset = self._mixture(blend, part, wanted, number, cache)
        if dataset is not None and wanted is not None and len(dataset) < wanted:
            raise DataError(
                f"The {SPLITS[number]} data has {len(dataset)} samples, each used once since no weights are given, but "
                f"{wanted} are to be taken. Give weights to repeat data, or lower "
                + ("--train-iters / --train-samples." if number == 0 else "--eval-iters (-1 takes everything once).")
            )
        if self.fim is not None and dataset is not None and number == 0:
            settings, tokens, codec = self.fim
            return FimDataset(dataset, settings, tokens, codec, self.settings.seed)
        return dataset

    def _part(self, number: int) -> tuple[tuple[float, float] | None, Blend | None]:
        settings = self.settings
        if settings.mock_data:
            return parse_split(mock.SPLIT)[number], None
        if settings.data_path:
            return parse_split(settings.split)[number], parse_blend(settings.data_path)
        paths = settings.per_split_paths[number]
        return (_WHOLE, parse_blend(paths, f"--{SPLITS[number]}-data-path")) if paths else (None, None)

    def _cache(self, blend: Blend | None) -> IndexCache | None:
        if blend is None and self.settings.data_cache_path is None:
            return None
        return IndexCache(folder=self._cache_folder("" if blend is None else blend.prefixes[0]), report=self.report)

    def _cache_folder(self, prefix: str) -> Path:
        if self.settings.data_cache_path is not None:
            return self.settings.data_cache_path
        if is_remote(prefix):
            raise DataError(f"{prefix} is a URL: give a local folder for its index with --data-cache-path.")
        return Path(prefix).parent / _CACHE_FOLDER

    def _source(self, prefix: str) -> TokenSource | InstructionSource:
        if prefix not in self.sources:
            if self.settings.instruction is not None:
                self.sources[prefix] = InstructionSource(prefix)
            elif self.settings.mock_data:
                self.sources[prefix] = mock.MockSource(self.vocab_size, self.eod)
            elif is_remote(prefix):
                remote = RemoteDataset(prefix, self._cache_folder(prefix))
                remote.check_vocabulary(self.vocab_size)
                self.sources[prefix] = remote
            else:
                corpus = IndexedDataset(prefix)
                corpus.check_vocabulary(self.vocab_size)
                self.sources[prefix] = corpus
        return self.sources[prefix]

    def _single(
        self, prefix: str, part: tuple[float, float], wanted: int | None, number: int, cache: IndexCache | None
    ) -> GPTDataset | InstructionDataset | None:
        source = self._source(prefix)
        first, last = split_range(part, len(source.lengths))
        if first == last and number > 0:
            self.report(f"no {SPLITS[number]} data: --split {self.settings.split} leaves none of {source.name} for it")
            return None
        return self._samples(source, first, last, wanted, number, cache)

    def _mixture(
        self, blend: Blend, part: tuple[float, float], wanted: int | None, number: int, cache: IndexCache | None
    ) -> Samples:
        if blend.weights is not None and wanted is None:
            raise DataError(
                "--eval-iters -1 takes every sample once and a blend with weights repeats some: give its paths without "
                f"weights with --{SPLITS[number]}-data-path."
            )
        weights = blend.weights
        target, prepared = dataset_sizes(weights or (), wanted or 0, self.settings.mid_level_dataset_surplus)
        sizes: list[int | None] = [*prepared] if weights is not None else [None] * len(blend.prefixes)
        datasets = []
        for prefix, size in zip(blend.prefixes, sizes, strict=True):
            source = self._source(prefix)
            first, last = split_range(part, len(source.lengths))
            datasets.append(self._samples(source, first, last, size, number, cache))
        if weights is None:
            return blend_all(datasets, cache)
        return blend_by_weight(datasets, weights, sum(target), cache)

    def _samples(
        self,
        source: TokenSource | InstructionSource,
        first: int,
        last: int,
        size: int | None,
        number: int,
        cache: IndexCache | None,
    ) -> GPTDataset | InstructionDataset:
        if isinstance(source, InstructionSource):
            return self._instruction_samples(source, first, last, size, cache)
        request = SampleRequest(
            first=first,
            last=last,
            num_samples=size,
            seq_length=self.settings.seq_length,
            seed=self.settings.seed,
            exact_epochs=self.settings.train_data_exact_num_epochs if number == 0 else None,
        )
        return GPTDataset(source, request, vocab_size=self.vocab_size, cache=cache)

    def _instruction_samples(
        self, source: InstructionSource, first: int, last: int, size: int | None, cache: IndexCache | None
    ) -> InstructionDataset:
        rules = self.settings.instruction
        request = InstructionRequest(
            first=first,
            last=last,
            num_samples=size,
            seq_length=self.settings.seq_length,
            seed=self.settings.seed,
            pack=rules is not None and rules.pack,
        )
        return InstructionDataset(source, request, vocab_size=self.vocab_size, cache=cache, report=self.report)
