"""Tokenizers: one interface over tokenizers, sentencepiece and tiktoken, each imported only when it is used."""

from __future__ import annotations

from megatron.tokenizer.base import TextError, Tokenizer, TokenizerError
from megatron.tokenizer.build import TOKENIZER_TYPES, build_tokenizer
from megatron.tokenizer.fit import check_fits
from megatron.tokenizer.settings import TokenizerSettings, settings_of_run

__all__ = [
    "TOKENIZER_TYPES",
    "TextError",
    "Tokenizer",
    "TokenizerError",
    "TokenizerSettings",
    "build_tokenizer",
    "check_fits",
    "settings_of_run",
]
