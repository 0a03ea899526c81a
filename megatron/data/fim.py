"""Fill in the middle: part of a document is moved behind the rest, so that the model learns to write what is missing.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle", with Megatron-LM's flags. Documents
are cut between characters, not tokens, so that the cuts of an editor are seen in training. Which documents change
depends on the seed and the number of the sample alone: a run that goes on sees what it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.blend import Samples
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import Tokens

_BROKEN = "\ufffd"


class Codec(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...

    def surroundings(self) -> tuple[list[int], list[int]]:
        """What `encode` puts around every text."""
        ...


@dataclass(frozen=True, kw_only=True)
class FimSettings:
    """Megatron-LM's --fim-* flags: probabilities, and tokens as texts.

    Raises:
        DataError: a probability outside of [0, 1], or --fim-fragment-rate without --fim-split-sample.
    """

    rate: float = 0.5
    spm_rate: float = 0.5
    split_sample: str | None = None
    fragment_rate: float | None = None
    no_prefix: str | None = None
    prefix_token: str = "<fim_prefix>"
    middle_token: str = "<fim_middle>"
    suffix_token: str = "<fim_suffix>"
    pad_token: str = "<fim_pad>"
    eod_token: str | None = None

    def __post_init__(self) -> None:
        for flag, value in (("", self.rate), ("spm-", self.spm_rate), ("fragment-", self.fragment_rate or 0.0)):
            if not 0 <= value <= 1:
                raise DataError(f"--fim-{flag}rate {value}: must be from 0 to 1.")
        if (self.fragment_rate is None) != (self.split_sample is None):
            raise DataError("--fim-split-sample and --fim-fragment-rate go together; one of them is missing.")


@dataclass(frozen=True, kw_only=True)
class FimTokens:
    """Ids of the special tokens."""

    prefix: int
    middle: int
    suffix: int
    pad: int
    eod: int
    split: int | None


def find_tokens(settings: FimSettings, codec: Codec, eod: int) -> FimTokens:
    """The ids of the tokens that the settings name.

    Raises:
        DataError: a text is not one token.
    """

    def single(flag: str, text: str) -> int:
        ids = _encode(codec, text)
        if len(ids) != 1:
            raise DataError(f"--fim-{flag} {text!r} is {len(ids)} tokens, not one: the tokenizer was made without it.")
        return int(ids[0])

    return FimTokens(
        prefix=single("prefix-token", settings.prefix_token),
        middle=single("middle-token", settings.middle_token),
        suffix=single("suffix-token", settings.suffix_token),
        pad=single("pad-token", settings.pad_token),
        eod=eod if settings.eod_token is None else single("eod-token", settings.eod_token),
        split=None if settings.split_sample is None else single("split-sample", settings.split_sample),
    )


class FimDataset:
    """Samples of another dataset, some of whose documents are rearranged.

    Args:
        samples: [s + 1] tokens each.
        settings: how often and how.
        tokens: see `find_tokens`.
        codec: the tokenizer.
        seed: of the choices.
    """

    def __init__(self, samples: Samples, settings: FimSettings, tokens: FimTokens, codec: Codec, seed: int) -> None:
        self.samples = samples
        self.settings = settings
        self.tokens = tokens
        self.codec = codec
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tokens:
        """Sample `index`, rearranged, and cut or filled up with padding to its length."""
        sample: Tokens = self.samples[index]
        rng = np.random.default_rng([self.seed, index])
        parts: list[npt.NDArray[np.int64]] = []
        ends = np.flatnonzero(sample == self.tokens.eod)
        start = 0
        for end in [*ends.tolist(), len(sample)]:
            parts += [self._document(sample[start:end], rng), sample[end : end + 1]]
            start = end + 1
        whole = np.concatenate(parts)[: len(sample)]
        missing = np.full(len(sample) - len(whole), self.tokens.pad, np.int64)
        return np.concatenate([whole, missing])

    def _document(self, document: Tokens, rng: np.random.Generator) -> Tokens:
        settings = self.settings
        if len(document) == 0 or rng.random() >= settings.rate:
            return document
        if self.tokens.split is None or settings.fragment_rate is None:
            return self._rearranged(document, rng)
        parts: list[Tokens] = []
        start = 0
        for end in [*np.flatnonzero(document == self.tokens.split).tolist(), len(document)]:
            fragment = document[start:end]
            if len(fragment) and rng.random() < settings.fragment_rate:
                fragment = self._rearranged(fragment, rng)
            parts += [fragment, document[end : end + 1]]
            start = end + 1
        return np.concatenate(parts)

    def _rearranged(self, document: Tokens, rng: np.random.Generator) -> Tokens:
        text = self.codec.decode(document.tolist())
        # A sample may begin or end within a character, which would not come back from text to the same tokens.
        if _BROKEN in text or (self.settings.no_prefix and text.startswith(self.settings.no_prefix)):
            return document
        first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
        prefix, middle, suffix = (
            _encode(self.codec, part) for part in (text[:first], text[first:second], text[second:])
        )
        tokens = self.tokens
        if rng.random() < self.settings.spm_rate:
            ids = [tokens.prefix, tokens.suffix, *suffix, tokens.middle, *prefix, *middle]
        else:
            ids = [tokens.prefix, *prefix, tokens.suffix, *suffix, tokens.middle, *middle]
        return np.array(ids, np.int64)


def _encode(codec: Codec, text: str) -> list[int]:
    """Ids of a part of a text, without what belongs around whole texts."""
    if not text:
        return []
    before, after = codec.surroundings()
    ids = codec.encode(text)
    return ids[len(before) : len(ids) - len(after)]
