"""The tokenizer's command line, for tools that take no other training flags."""

from __future__ import annotations

import argparse

from megatron.tokenizer.settings import TokenizerSettings


def add_tokenizer_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add Megatron's tokenizer flags and their AscendSpeed and BLOOM spellings to a parser."""
    group = parser.add_argument_group("tokenizer")
    # The type is checked by build_tokenizer, which names the nearest known one.
    group.add_argument("--tokenizer-type", required=required, help="kind of tokenizer, such as HuggingFaceTokenizer")
    group.add_argument(
        "--tokenizer-model", "--tokenizer-name-or-path", help="model file, Hugging Face folder or cached model name"
    )
    group.add_argument("--vocab-file", help="vocab.json of a GPT-2 tokenizer")
    group.add_argument("--merge-file", help="merges.txt of a GPT-2 tokenizer")
    group.add_argument("--vocab-size", type=int, help="ids of a NullTokenizer or TikTokenizer; a check for the others")
    group.add_argument("--vocab-extra-ids", type=int, default=0, help="tokens <extra_id_N> of a SentencePieceTokenizer")
    group.add_argument("--eod-token", help="text of the token that ends a document, where the files name none")
    group.add_argument("--tokenizer-special-tokens", nargs="+", help="names of the first ids of a TikTokenizer")
    group.add_argument("--tiktoken-pattern", help="v1 or v2: how a TikTokenizer cuts text into words")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000, help="ids kept for special tokens")
    group.add_argument("--null-tokenizer-eod-id", type=int, help="EOD of a NullTokenizer, inside --vocab-size")
    group.add_argument("--null-tokenizer-pad-id", type=int, default=-1, help="PAD of a NullTokenizer; -1: none")
    group.add_argument(
        "--tokenizer-hf-no-use-fast",
        "--tokenizer-not-use-fast",
        dest="hf_use_fast",
        action="store_false",
        help="in a Hugging Face folder, take tokenizer.model before tokenizer.json",
    )
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        dest="hf_include_special_tokens",
        action="store_false",
        help="do not add what tokenizer.json puts around every text, such as BOS",
    )


def tokenizer_settings(args: argparse.Namespace) -> TokenizerSettings:
    """The settings in a parsed command line that has the flags of `add_tokenizer_flags`."""
    special: list[str] | None = args.tokenizer_special_tokens
    return TokenizerSettings(
        type=args.tokenizer_type,
        model=args.tokenizer_model,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        vocab_size=args.vocab_size,
        vocab_extra_ids=args.vocab_extra_ids,
        eod_token=args.eod_token,
        special_tokens=tuple(special) if special else None,
        tiktoken_pattern=args.tiktoken_pattern,
        tiktoken_num_special_tokens=args.tiktoken_num_special_tokens,
        null_eod_id=args.null_tokenizer_eod_id,
        null_pad_id=args.null_tokenizer_pad_id,
        hf_use_fast=args.hf_use_fast,
        hf_include_special_tokens=args.hf_include_special_tokens,
    )
