"""Tokenizers of the `tokenizers` library: Hugging Face folders, `tokenizer.json`, and GPT-2's pair of files.

Only the `tokenizers` package is used: no model library, no network once the files are there, and no code from the
folder is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron.tokenizer.base import (
    TextError,
    TokenizerError,
    fingerprint_of,
    read_json,
    refuse_eod,
    require_file,
    require_unicode,
)
from megatron.tokenizer.settings import TokenizerSettings

GPT2_EOD = "<|endoftext|>"
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FastTokenizer:
    """A tokenizer of the `tokenizers` library.

    A special token that is spelled out in a text becomes that token, as everywhere in Hugging Face's libraries.
    """

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        *,
        name: str,
        roles: Mapping[str, str],
        eod_token: str | None,
        include_special_tokens: bool,
        fingerprint: str,
    ) -> None:
        """Wrap an engine.

        Args:
            engine: the loaded tokenizer; its truncation and padding are switched off, since they would cut documents.
            name: what to call it in messages.
            roles: text of `bos_token`, `eos_token` and `pad_token`, where known.
            eod_token: text of the token that ends a document; None takes `eos_token`.
            include_special_tokens: whether `encode` adds what the tokenizer's own template adds, such as BOS.
            fingerprint: see `Tokenizer.fingerprint`.

        Raises:
            TokenizerError: no token ends a document.
        """
        engine.no_truncation()
        engine.no_padding()
        self.backend = engine
        self._add_special = include_special_tokens
        self._fingerprint = fingerprint
        self.name = name
        ids = engine.get_vocab(with_added_tokens=True)
        # A vocabulary may have holes: the number of entries is then less than the highest id plus one.
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.bos, self.eos, self.pad = (
            ids.get(roles.get(role, "")) for role in ("bos_token", "eos_token", "pad_token")
        )
        self.eod = self._find_eod(ids, roles, eod_token)

    def _find_eod(self, ids: Mapping[str, int], roles: Mapping[str, str], eod_token: str | None) -> int:
        if eod_token is not None:
            if eod_token not in ids:
                raise TokenizerError(f"--eod-token {eod_token!r} is not in the vocabulary of {self.name}")
            return ids[eod_token]
        if self.eos is None:
            special = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
            raise refuse_eod(self.name, special)
        return self.eos

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text."""
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=self._add_special)
        except (TypeError, UnicodeEncodeError) as error:
            for text in texts:
                require_unicode(text)
            raise TextError(f"cannot be encoded: {error}") from error
        return [encoding.ids for encoding in encodings]

    def surroundings(self) -> tuple[list[int], list[int]]:
        """The ids that `encode` puts in front of every text and behind it."""
        inner, outer = (self.backend.encode("a", add_special_tokens=add).ids for add in (False, self._add_special))
        start = next(i for i in range(len(outer)) if outer[i : i + len(inner)] == inner)
        return outer[:start], outer[start + len(inner) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens spelled out."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def fingerprint(self) -> str:
        """Hash of the files and the settings."""
        return self._fingerprint


def load_tokenizer_json(file: Path, settings: TokenizerSettings) -> FastTokenizer:
    """A tokenizer from `tokenizer.json`, with the roles of its special tokens from the files beside it.

    Raises:
        TokenizerError: the file is of another kind, or no token ends a document.
    """
    try:
        engine = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises bare Exception for whatever it cannot read.
        raise TokenizerError(
            f"--tokenizer-model {file} is not a tokenizer.json of the tokenizers library: {error}{_hint(file)}"
        ) from error
    siblings = [file.parent / name for name in _CONFIG_FILES] if file.name == "tokenizer.json" else []
    configs = [sibling for sibling in siblings if sibling.is_file()]
    config = _merged(configs)
    roles = _roles(config)
    _add_declared_tokens(engine, config, roles)
    engine.encode_special_tokens = bool(config.get("split_special_tokens", False))
    return FastTokenizer(
        engine,
        name=f"{settings.type} {file}",
        roles=roles,
        eod_token=settings.eod_token,
        include_special_tokens=settings.hf_include_special_tokens,
        fingerprint=fingerprint_of(
            "tokenizer.json",
            [file, *configs],
            {"eod_token": settings.eod_token, "include_special_tokens": settings.hf_include_special_tokens},
        ),
    )


def load_gpt2(settings: TokenizerSettings) -> FastTokenizer:
    """GPT-2's byte-level BPE from `vocab.json` and `merges.txt`, with nothing fetched from anywhere.

    Raises:
        TokenizerError: a file is missing, of another kind, or has no end-of-document token.
    """
    vocab = require_file(settings.vocab_file, flag="--vocab-file", kind=settings.type)
    merges = require_file(settings.merge_file, flag="--merge-file", kind=settings.type)
    return load_gpt2_files(vocab, merges, settings)


def load_gpt2_files(vocab: Path, merges: Path, settings: TokenizerSettings) -> FastTokenizer:
    """As `load_gpt2`, from two files that are known to exist."""
    content = read_json(vocab, flag="--vocab-file", expected="a vocab.json of GPT-2 (JSON, token to id)")
    if not isinstance(content, dict) or not all(isinstance(value, int) for value in content.values()):
        raise TokenizerError(f"--vocab-file {vocab} is not a vocab.json of GPT-2 (JSON, token to id){_hint(vocab)}")
    try:
        engine = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # The library raises bare Exception for whatever it cannot read.
        raise TokenizerError(
            f"--merge-file {merges} does not belong to --vocab-file {vocab}, or is not a merges.txt: {error}"
        ) from error
    eod_token = settings.eod_token or GPT2_EOD
    if eod_token not in content:
        raise TokenizerError(
            f"--vocab-file {vocab} has no {eod_token!r} to end documents with; name its token with --eod-token"
        )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(eod_token, special=True)])
    return FastTokenizer(
        engine,
        name=f"{settings.type} {vocab}",
        roles={"bos_token": eod_token, "eos_token": eod_token},
        eod_token=eod_token,
        include_special_tokens=False,
        fingerprint=fingerprint_of("gpt2", [vocab, merges], {"eod_token": eod_token}),
    )


def _merged(files: Sequence[Path]) -> dict[str, Any]:
    """The JSON objects of these files; the first file wins."""
    merged: dict[str, Any] = {}
    for file in reversed(files):
        merged |= read_json(file, flag="--tokenizer-model", expected="a JSON object")
    return merged


def _text(token: object) -> str | None:
    """A token is written as its text, or as an object with its text in `content`."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _roles(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {role: _text(config.get(role)) for role in _NAMED}
    return {role: text for role, text in texts.items() if text is not None}


def _declared(config: Mapping[str, Any], roles: Mapping[str, str]) -> Iterator[AddedToken]:
    """Tokens that the configuration promises, in the order in which Hugging Face adds those that are missing."""
    for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        yield AddedToken(
            token["content"],
            single_word=token.get("single_word", False),
            lstrip=token.get("lstrip", False),
            rstrip=token.get("rstrip", False),
            normalized=token.get("normalized", not token.get("special", False)),
            special=token.get("special", False),
        )
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for token in [*roles.values(), *(extra.values() if isinstance(extra, Mapping) else extra)]:
        text = _text(token)
        if text is not None:
            yield AddedToken(text, special=True)


def _add_declared_tokens(engine: tokenizers.Tokenizer, config: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    known = {token.content for token in engine.get_added_tokens_decoder().values()}
    for token in _declared(config, roles):
        if token.content not in known:
            known.add(token.content)
            engine.add_tokens([token])


def _hint(file: Path) -> str:
    """What a file of the wrong kind seems to be, and which type reads that."""
    head = file.read_bytes()[:4096]
    if file.suffix == ".model" and b"\x00" in head:
        return (
            ". It looks like a SentencePiece model: use --tokenizer-type Llama2Tokenizer or GPTSentencePieceTokenizer"
        )
    if b'"token_bytes"' in head:
        return ". It looks like a tiktoken vocabulary: use --tokenizer-type TikTokenizer"
    if b'"added_tokens"' in head or b'"pre_tokenizer"' in head:
        return ". It looks like a tokenizer.json: use --tokenizer-type HuggingFaceTokenizer --tokenizer-model"
    return ""
