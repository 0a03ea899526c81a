"""Documents cut into sentences, for --split-sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.data.preprocess import streams

# The names that NLTK's models have, which --lang takes in Megatron.
_CODES = {
    **{"czech": "cs", "danish": "da", "dutch": "nl", "english": "en", "estonian": "et", "finnish": "fi"},
    **{"french": "fr", "german": "de", "greek": "el", "italian": "it", "norwegian": "no", "polish": "pl"},
    **{"portuguese": "pt", "russian": "ru", "slovene": "sl", "spanish": "es", "swedish": "sv", "turkish": "tr"},
}


@dataclass(frozen=True, kw_only=True)
class SentenceCutter:
    """Cuts with the `sentencex` library of the Wikimedia Foundation.

    Attributes:
        language: name in English, or code such as `en`.
        keep_newlines: keep the white space around sentences.
    """

    language: str = "english"
    keep_newlines: bool = False

    def __call__(self, text: str) -> Iterator[str]:
        """The sentences of a text that hold more than white space."""
        sentencex = streams.optional("sentencex", "sentencex", "--split-sentences")
        for sentence in sentencex.segment(_CODES.get(self.language, self.language), text):
            if sentence.strip():
                yield sentence if self.keep_newlines else sentence.strip()
