"""Made-up documents for runs without files (--mock-data): the ones Megatron Core makes up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SEED = 0
_DOCUMENTS = 100_000
_LONGEST = 4096
SPLIT = "1,1,1"


class MockSource:
    """100,000 documents of 1 to 4095 tokens that count up from 1 modulo the vocabulary and end with EOD."""

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size = vocab_size
        self.eod = eod
        generator = np.random.default_rng(_SEED)
        self._lengths = generator.integers(1, _LONGEST, _DOCUMENTS, dtype=np.int32)
        self._counting = np.arange(1, _LONGEST, dtype=np.int64) % vocab_size

    @property
    def name(self) -> str:
        """How messages call it."""
        return "the mock data"

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[documents] tokens of each."""
        return self._lengths

    def fingerprint(self) -> str:
        """The lengths never change."""
        return "mock"

    def read(self, sequence: int, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Tokens `start` to `stop` of one document."""
        tokens = self._counting[start:stop]
        if stop == self._lengths[sequence] and stop > start:
            tokens = tokens.copy()
            tokens[-1] = self.eod
        return tokens
