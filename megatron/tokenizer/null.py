"""A tokenizer without a vocabulary, for tests and measurements: text is numbers separated by spaces."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.tokenizer.base import TextError, TokenizerError, fingerprint_of
from megatron.tokenizer.settings import TokenizerSettings


class NullTokenizer:
    """Text is token ids in decimal, separated by white space.

    Two conventions exist for the end of a document. In Megatron-DeepSpeed, and here unless told otherwise, it is one
    more token behind `--vocab-size` N: EOD is N and the vocabulary has N + 1 ids. In the current Megatron-LM it lies
    inside: `--null-tokenizer-eod-id` (there N - 1 by default) leaves the vocabulary at N ids.
    """

    def __init__(self, *, size: int, eod: int | None, pad: int) -> None:
        """Build it for `--vocab-size` `size`.

        Raises:
            TokenizerError: a size or an id out of range.
        """
        if size < 1:
            raise TokenizerError(f"--vocab-size {size}: must be at least 1")
        self.vocab_size = size + 1 if eod is None else size
        self.eod = size if eod is None else eod
        for flag, number, lowest in (("eod", self.eod, 0), ("pad", pad, -1)):
            if not lowest <= number < self.vocab_size:
                raise TokenizerError(f"--null-tokenizer-{flag}-id {number}: must be from 0 to {self.vocab_size - 1}")
        self.name = f"NullTokenizer of {self.vocab_size} ids"
        self.bos: int | None = None
        self.eos: int | None = self.eod
        self.pad = pad if pad >= 0 else None

    def encode(self, text: str) -> list[int]:
        """The numbers in the text. Raises `TextError` for a word that is no id."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise TextError(f"is not numbers separated by spaces: {error}") from error
        wrong = next((number for number in ids if not 0 <= number < self.vocab_size), None)
        if wrong is not None:
            raise TextError(f"holds id {wrong}; ids go from 0 to {self.vocab_size - 1} (--vocab-size)")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers in every text."""
        return [self.encode(text) for text in texts]

    def surroundings(self) -> tuple[list[int], list[int]]:
        """Nothing is added."""
        return [], []

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, separated by spaces."""
        return " ".join(str(int(number)) for number in ids)

    def fingerprint(self) -> str:
        """Hash of the settings."""
        return fingerprint_of("null", [], {"vocab_size": self.vocab_size, "eod": self.eod, "pad": self.pad})


def load_null(settings: TokenizerSettings) -> NullTokenizer:
    """`NullTokenizer` of `--vocab-size`."""
    if settings.vocab_size is None:
        raise TokenizerError("NullTokenizer needs --vocab-size, which was not given")
    return NullTokenizer(size=settings.vocab_size, eod=settings.null_eod_id, pad=settings.null_pad_id)
