"""From settings to a tokenizer: the table of types, and the checks that hold for all of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from megatron.tokenizer.base import Tokenizer, TokenizerError, require_file
from megatron.tokenizer.settings import TokenizerSettings


@dataclass(frozen=True)
class _Kind:
    """One type: `function` of `module` builds it, from the settings or from (`--tokenizer-model` file, settings)."""

    module: str
    function: str
    takes_file: bool = False
    fields: frozenset[str] = frozenset()


_HF = _Kind(
    "folder",
    "load_huggingface",
    fields=frozenset({"model", "eod_token", "hf_use_fast", "hf_include_special_tokens"}),
)
# Modules are imported when a type is asked for: each needs a library that the others do not.
_KINDS = {
    "HuggingFaceTokenizer": _HF,
    "HFTokenizer": _HF,
    "PretrainedFromHF": _HF,
    "GPT2BPETokenizer": _Kind("huggingface", "load_gpt2", fields=frozenset({"vocab_file", "merge_file", "eod_token"})),
    "SentencePieceTokenizer": _Kind("pieces", "load_marked", takes_file=True, fields=frozenset({"vocab_extra_ids"})),
    "GPTSentencePieceTokenizer": _Kind("pieces", "load_gpt_pieces", takes_file=True, fields=frozenset({"eod_token"})),
    "Llama2Tokenizer": _Kind("pieces", "load_llama2", takes_file=True, fields=frozenset({"eod_token"})),
    "Llama3Tokenizer": _Kind("ranks", "load_llama3", takes_file=True),
    "TikTokenizer": _Kind(
        "ranks",
        "load_tiktoken",
        takes_file=True,
        fields=frozenset({"special_tokens", "tiktoken_pattern", "tiktoken_num_special_tokens"}),
    ),
    "NullTokenizer": _Kind("null", "load_null", fields=frozenset({"null_eod_id", "null_pad_id"})),
}
TOKENIZER_TYPES = tuple(_KINDS)
_SIZE_FROM_FLAG = ("NullTokenizer", "TikTokenizer")
_REFUSED = {
    "BertWordPieceLowerCase": "it is for BERT, and this project trains decoder-only models",
    "BertWordPieceCase": "it is for BERT, and this project trains decoder-only models",
    "MultimodalTokenizer": "it is for models with images, and this project trains text models",
    "NullMultimodalTokenizer": "it is for models with images, and this project trains text models",
    "SFTTokenizer": "chat formatting is not part of a tokenizer here; use HuggingFaceTokenizer on the same files",
}
_FLAGS = {
    "model": "--tokenizer-model",
    "vocab_file": "--vocab-file",
    "merge_file": "--merge-file",
    "vocab_extra_ids": "--vocab-extra-ids",
    "eod_token": "--eod-token",
    "special_tokens": "--tokenizer-special-tokens",
    "tiktoken_pattern": "--tiktoken-pattern",
    "tiktoken_num_special_tokens": "--tiktoken-num-special-tokens",
    "null_eod_id": "--null-tokenizer-eod-id",
    "null_pad_id": "--null-tokenizer-pad-id",
    "hf_use_fast": "--tokenizer-hf-no-use-fast",
    "hf_include_special_tokens": "--tokenizer-hf-no-include-special-tokens",
}


def build_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer that the settings describe.

    Raises:
        TokenizerError: an unknown type, a missing or wrong file, a setting this type cannot obey, a library that is
            not installed, or a size other than the one given.
    """
    kind = _kind(settings.type)
    _refuse_unused(settings, kind)
    try:
        module = import_module(f"megatron.tokenizer.{kind.module}")
    except ModuleNotFoundError as error:
        raise TokenizerError(
            f"{settings.type} needs the Python package {error.name}: pip install {error.name}"
        ) from error
    load = cast("Callable[..., Tokenizer]", getattr(module, kind.function))
    if kind.takes_file:
        tokenizer = load(require_file(settings.model, flag="--tokenizer-model", kind=settings.type), settings)
    else:
        tokenizer = load(settings)
    _check_size(settings, tokenizer)
    return tokenizer


def _kind(name: str) -> _Kind:
    if name in _KINDS:
        return _KINDS[name]
    if name in _REFUSED:
        raise TokenizerError(f"--tokenizer-type {name} is not supported: {_REFUSED[name]}")
    lower = {known.lower(): known for known in _KINDS}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.5)]
    nearest = f"did you mean {' or '.join(near)}? " if near else ""
    raise TokenizerError(f"--tokenizer-type {name!r} is unknown; {nearest}Known: {', '.join(TOKENIZER_TYPES)}")


def _refuse_unused(settings: TokenizerSettings, kind: _Kind) -> None:
    """A setting that this type does not read would otherwise be ignored in silence."""
    neutral = TokenizerSettings(type=settings.type)
    changed = [name for name in _FLAGS if getattr(settings, name) != getattr(neutral, name)]
    used = kind.fields | ({"model"} if kind.takes_file else set())
    unused = [_FLAGS[name] for name in changed if name not in used]
    if unused:
        takes = ", ".join(flag for name, flag in _FLAGS.items() if name in used)
        raise TokenizerError(f"{settings.type} has no use for {', '.join(unused)}; it takes {takes}. Leave it out")


def _check_size(settings: TokenizerSettings, tokenizer: Tokenizer) -> None:
    if settings.vocab_size is None or settings.type in _SIZE_FROM_FLAG or settings.vocab_size == tokenizer.vocab_size:
        return
    raise TokenizerError(
        f"--vocab-size {settings.vocab_size} was given, but {tokenizer.name} has {tokenizer.vocab_size} ids. Leave "
        "--vocab-size out: the files tell it, and the embedding is padded by --make-vocab-size-divisible-by"
    )
