"""What a user may say about the tokenizer, as one frozen record."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.tokenizer import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Settings of one tokenizer. Field names follow Megatron's flags; files are paths on this machine.

    Attributes:
        type: name of the kind, as in `--tokenizer-type`.
        model: `--tokenizer-model`: a file, a Hugging Face folder, or a name in the local Hugging Face cache.
        vocab_file: `--vocab-file`: `vocab.json` of a GPT-2 style tokenizer.
        merge_file: `--merge-file`: `merges.txt` of a GPT-2 style tokenizer.
        vocab_size: `--vocab-size`: the size itself for kinds whose file does not tell it; a check for the others.
        vocab_extra_ids: `--vocab-extra-ids`: sentinel tokens `<extra_id_N>` added by `SentencePieceTokenizer`.
        eod_token: `--eod-token`: text of the token that ends a document, for tokenizers whose files do not name one.
        special_tokens: `--tokenizer-special-tokens`: names of the first ids of a `TikTokenizer`.
        tiktoken_pattern: `--tiktoken-pattern`: `v1` or `v2`, how `TikTokenizer` cuts text before merging.
        tiktoken_num_special_tokens: `--tiktoken-num-special-tokens`: ids that `TikTokenizer` keeps for special tokens.
        null_eod_id: `--null-tokenizer-eod-id`: see `NullTokenizer`.
        null_pad_id: `--null-tokenizer-pad-id`: padding id of `NullTokenizer`; negative means that there is none.
        hf_use_fast: false with `--tokenizer-hf-no-use-fast`: prefer a SentencePiece model over `tokenizer.json`.
        hf_include_special_tokens: false with `--tokenizer-hf-no-include-special-tokens`: `encode` adds no BOS or EOS.
    """

    type: str
    model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    vocab_extra_ids: int = 0
    eod_token: str | None = None
    special_tokens: tuple[str, ...] | None = None
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int = 1000
    null_eod_id: int | None = None
    null_pad_id: int = -1
    hf_use_fast: bool = True
    hf_include_special_tokens: bool = True


def settings_of_run(config: TokenizerConfig) -> TokenizerSettings:
    """The tokenizer that a training run's flags ask for."""
    return TokenizerSettings(
        type=config.tokenizer_type,
        model=config.tokenizer_model,
        vocab_file=config.vocab_file,
        merge_file=config.merge_file,
        vocab_size=config.vocab_size,
        vocab_extra_ids=config.vocab_extra_ids,
        eod_token=config.eod_token,
        special_tokens=config.special_tokens,
        tiktoken_pattern=config.tiktoken_pattern,
        tiktoken_num_special_tokens=config.tiktoken_num_special_tokens,
        null_eod_id=config.null_tokenizer_eod_id,
        null_pad_id=config.null_tokenizer_pad_id,
        hf_use_fast=not config.tokenizer_hf_no_use_fast,
        hf_include_special_tokens=not config.tokenizer_hf_no_include_special_tokens,
    )
