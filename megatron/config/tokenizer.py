"""Settings of the tokenizer and the size of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option, resolved


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer made the data, and how many tokens it knows."""

    tokenizer_type: Literal[
        "BertWordPieceLowerCase",
        "BertWordPieceCase",
        "GPT2BPETokenizer",
        "SentencePieceTokenizer",
        "GPTSentencePieceTokenizer",
        "HFTokenizer",
        "NullTokenizer",
        "HuggingFaceTokenizer",
        "PretrainedFromHF",
        "Llama2Tokenizer",
        "Llama3Tokenizer",
        "TikTokenizer",
    ] = resolved("Kind of tokenizer. Default: GPT2BPETokenizer; NullTokenizer with --mock-data.")
    tokenizer_model: str | None = option(
        None,
        "File of a sentencepiece, tiktoken or tokenizers model, or directory or name of a Hugging Face tokenizer.",
        aliases=("--tokenizer-name-or-path",),
    )
    vocab_file: str | None = option(None, "Vocabulary of a GPT-2 tokenizer (vocab.json).")
    merge_file: str | None = option(None, "Merges of a GPT-2 tokenizer (merges.txt).")
    vocab_size: int | None = option(
        None,
        "Number of tokens: needed by a NullTokenizer, which adds one that ends documents; a check for the others.",
        minimum=1,
    )
    vocab_extra_ids: int = option(0, "Sentinel tokens that a SentencePieceTokenizer adds.", minimum=0)
    eod_token: str | None = option(None, "Text of the token that ends a document, where the files do not name one.")
    padded_vocab_size: int | None = option(
        None,
        "Rows of the embedding, instead of those computed from the number of tokens.",
        aliases=("--pad-vocab-size-to",),
        minimum=1,
    )
    pad_vocab_size: bool = option(
        True,
        "The embedding has exactly as many rows as the tokenizer has tokens.",
        "--no-pad-vocab-size",
        aliases=("--disable-pad-vocab-size",),
    )
    tiktoken_pattern: Literal["v1", "v2"] | None = option(None, "How a tiktoken tokenizer splits text into words.")
    tiktoken_num_special_tokens: int = option(1000, "Special tokens of a tiktoken tokenizer.", minimum=0)
    special_tokens: tuple[str, ...] | None = option(
        None, "Names of the first tokens of a tiktoken tokenizer.", "--tokenizer-special-tokens"
    )
    null_tokenizer_eod_id: int | None = option(
        None, "Token (an id) that ends a document of a NullTokenizer.", minimum=0
    )
    null_tokenizer_pad_id: int = option(-1, "Token (an id) that a NullTokenizer pads with; -1 is none.", minimum=-1)
    tokenizer_hf_no_use_fast: bool = option(
        False, "Prefer a sentencepiece model to tokenizer.json.", aliases=("--tokenizer-not-use-fast",)
    )
    tokenizer_hf_no_include_special_tokens: bool = option(False, "Encode text without tokens for its begin and end.")
