"""Pretraining samples: fixed-length windows over the shuffled documents of one corpus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_cache import IndexCache
from megatron.data.indexed_dataset import Tokens, TokenSource, check_tokens
from megatron.data.sample_index import SampleIndex, build_sample_index, map_sample_index, plan_epochs


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Which samples are wanted of a corpus.

    Attributes:
        first: first sequence of the split.
        last: one after the last sequence of the split.
        num_samples: how many at least; None for all of one epoch, the incomplete sample at its end left out.
        seq_length: tokens that enter the model; a sample has one more.
        seed: of the order.
        exact_epochs: --train-data-exact-num-epochs.
    """

    first: int
    last: int
    num_samples: int | None
    seq_length: int
    seed: int
    exact_epochs: int | None = None


class GPTDataset:
    """Samples [s + 1] int64 of one corpus; sample i is the i-th that training sees.

    Args:
        source: the corpus.
        request: which samples.
        vocab_size: tokens outside of it are refused when a sample is read.
        cache: where the order is kept between runs; None builds it in memory.

    Raises:
        DataError: the split holds no tokens, or the request contradicts itself.
    """

    def __init__(
        self, source: TokenSource, request: SampleRequest, *, vocab_size: int, cache: IndexCache | None
    ) -> None:
        self.source = source
        self.seq_length = request.seq_length
        self.vocab_size = vocab_size
        self.index = _index(source, request, cache)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Tokens:
        """The `seq_length + 1` tokens of sample `index`.

        Raises:
            IndexError: beyond the last sample.
            DataError: a token outside of the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.source.name}, which has {len(self)}")
        row = int(self.index.shuffle[index])
        (position, offset), (last_position, last_offset) = self.index.samples[row : row + 2].tolist()
        sample = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        documents = self.index.documents[position : last_position + 1].tolist()
        for number, document in enumerate(documents):
            is_last = number == len(documents) - 1
            stop = last_offset + 1 if is_last else int(self.source.lengths[document])
            part = self.source.read(document, offset if number == 0 else 0, stop)
            sample[filled : filled + len(part)] = part
            filled += len(part)
        check_tokens(sample, self.vocab_size, f"sample {index} (sequences {documents[:3]} ...) of {self.source.name}")
        return sample


def _index(source: TokenSource, request: SampleRequest, cache: IndexCache | None) -> SampleIndex:
    lengths = source.lengths
    tokens = int(lengths[request.first : request.last].sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(f"Sequences {request.first} to {request.last} of {source.name} hold no tokens; see --split.")
    plan = plan_epochs(tokens, request.seq_length, request.num_samples, request.exact_epochs)

    def build() -> SampleIndex:
        return build_sample_index(
            lengths, request.first, request.last, plan=plan, seq_length=request.seq_length, seed=request.seed
        )

    if cache is None:
        return build()
    key = {
        "lengths": source.fingerprint(),
        "range": [request.first, request.last],
        "seq_length": request.seq_length,
        "seed": request.seed,
        "epochs": plan.epochs,
        "first_group": plan.first_group,
    }
    paths = cache.load_or_build("samples", key, lambda: _arrays(build()))
    return map_sample_index((paths["documents"], paths["order"], paths["shuffle"]))


def _arrays(index: SampleIndex) -> dict[str, npt.NDArray[np.integer]]:
    return {"documents": index.documents, "order": index.samples, "shuffle": index.shuffle}
