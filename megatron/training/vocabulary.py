"""The tokenizer of a run and the architecture with its vocabulary."""

from __future__ import annotations

from megatron.config.architecture import Architecture
from megatron.config.run import RunConfig
from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer import Tokenizer, TokenizerSettings, build_tokenizer
from megatron.training.report import Printer


def tokenizer_settings(config: TokenizerConfig) -> TokenizerSettings:
    """What the flags say about the tokenizer."""
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


def build_vocabulary(config: RunConfig, say: Printer) -> tuple[Tokenizer, Architecture]:
    """The tokenizer, and the model with as many words; reports the padding of the vocabulary as Megatron does."""
    say(f"> building {config.tokenizer.tokenizer_type} tokenizer ...")
    tokenizer = build_tokenizer(tokenizer_settings(config.tokenizer))
    arch = config.architecture(tokenizer.vocab_size)
    padding = arch.padded_vocab_size - arch.vocab_size
    say(
        f" > padded vocab (size: {arch.vocab_size}) with {padding} dummy tokens (new size: {arch.padded_vocab_size})"
    )
    return tokenizer, arch
