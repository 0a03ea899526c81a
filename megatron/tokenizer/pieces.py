"""SentencePiece models: GPT style, LLaMA style, and T5 style with special tokens behind the model's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import sentencepiece

from megatron.tokenizer.base import TextError, TokenizerError, fingerprint_of, refuse_eod, require_unicode
from megatron.tokenizer.settings import TokenizerSettings


class PlainPieces:
    """A SentencePiece model as it is (`GPTSentencePieceTokenizer`, `Llama2Tokenizer`): EOD is the model's EOS.

    A control token spelled out in a text, such as `</s>`, stays text.
    """

    def __init__(self, file: Path, *, kind: str, add_bos: bool, add_eos: bool = False, eod_token: str | None) -> None:
        """Load a model; `add_bos` and `add_eos` say what `encode` puts around every text.

        Raises:
            TokenizerError: not a SentencePiece model, or it lacks a token that is needed.
        """
        self._model = _load(file)
        self.name = f"{kind} {file}"
        self.vocab_size: int = self._model.get_piece_size()
        self.bos = _or_none(self._model.bos_id())
        self.eos = _or_none(self._model.eos_id())
        self.pad = _or_none(self._model.pad_id())
        self.eod = self._find_eod(eod_token)
        if add_bos and self.bos is None:
            raise TokenizerError(f"{self.name} has no BOS token, and {kind} starts every document with one")
        self._before = [self.bos] if add_bos and self.bos is not None else []
        self._after = [self.eod] if add_eos else []
        self.marks = [
            self._model.id_to_piece(i)
            for i in range(self.vocab_size)
            if self._model.is_control(i) or self._model.is_unknown(i)
        ]
        self._fingerprint = fingerprint_of(
            "sentencepiece", [file], {"add_bos": add_bos, "add_eos": add_eos, "eod_token": eod_token}
        )

    def _find_eod(self, eod_token: str | None) -> int:
        if eod_token is not None:
            found: int = self._model.piece_to_id(eod_token)
            if self._model.id_to_piece(found) != eod_token:
                raise TokenizerError(f"--eod-token {eod_token!r} is not in the vocabulary of {self.name}")
            return found
        if self.eos is None:
            control = [self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)]
            raise refuse_eod(self.name, control)
        return self.eos

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, with BOS in front where this kind has it."""
        return [*self._before, *_ids(self._model, text), *self._after]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text."""
        return [self.encode(text) for text in texts]

    def surroundings(self) -> tuple[list[int], list[int]]:
        """The ids that `encode` puts in front of every text and behind it."""
        return self._before, self._after

    def model_proto(self) -> bytes:
        """The content of the model file."""
        proto: bytes = self._model.serialized_model_proto()
        return proto

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; control tokens leave nothing."""
        text: str = self._model.decode_ids(list(ids))
        return text

    def fingerprint(self) -> str:
        """Hash of the file and the settings."""
        return self._fingerprint


class MarkedPieces:
    """A SentencePiece model with `<CLS> <SEP> <EOD> <MASK>`, PAD, BOS, EOS and extra ids (`SentencePieceTokenizer`).

    Tokens the model lacks get the next free ids in that order. They are recognised where a text spells them out.
    """

    def __init__(self, file: Path, *, kind: str, extra_ids: int) -> None:
        """Load a model and add the tokens.

        Raises:
            TokenizerError: not a SentencePiece model.
        """
        self._model = _load(file)
        self.name = f"{kind} {file}"
        self._vocab = {self._model.id_to_piece(i): i for i in range(self._model.get_piece_size())}
        self._special: dict[str, int] = {}
        for token in ("<CLS>", "<SEP>"):
            self._add(token)
        self.eod = self._add("<EOD>")
        self._add("<MASK>")
        self.pad: int | None = self._add(self._named(self._model.pad_id(), "<PAD>"))
        self.bos: int | None = self._add(self._named(self._model.bos_id(), "<BOS>"))
        self.eos: int | None = self._add(self._named(self._model.eos_id(), "<EOS>"))
        for number in range(extra_ids):
            self._add(f"<extra_id_{number}>")
        self.vocab_size = len(self._vocab)
        self._marks = re.compile("|".join(re.escape(token) for token in sorted(self._special, key=len, reverse=True)))
        self._texts = {number: token for token, number in self._special.items()}
        self._fingerprint = fingerprint_of("sentencepiece-marked", [file], {"extra_ids": extra_ids})

    def _named(self, number: int, otherwise: str) -> str:
        piece: str = self._model.id_to_piece(number) if number >= 0 else otherwise
        return piece

    def _add(self, token: str) -> int:
        number = self._vocab.setdefault(token, len(self._vocab))
        self._special[token] = number
        return number

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        found = list(self._marks.finditer(text))
        ends = [(0, 0), *(mark.span() for mark in found), (len(text), len(text))]
        marks = [[self._special[mark.group()]] for mark in found] + [[]]
        ids: list[int] = []
        for ((_, start), (end, _)), mark in zip(pairwise(ends), marks, strict=True):
            ids += _ids(self._model, text[start:end]) + mark
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text."""
        return [self.encode(text) for text in texts]

    def surroundings(self) -> tuple[list[int], list[int]]:
        """Nothing is added."""
        return [], []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; added tokens are spelled out with a space on each side."""
        parts: list[str] = []
        plain: list[int] = []
        for number in ids:
            if number in self._texts:
                parts += [self._model.decode_ids(plain), self._texts[number]]
                plain = []
            else:
                plain.append(int(number))
        return " ".join([*parts, self._model.decode_ids(plain)])

    def fingerprint(self) -> str:
        """Hash of the file and the settings."""
        return self._fingerprint


def load_gpt_pieces(file: Path, settings: TokenizerSettings) -> PlainPieces:
    """`GPTSentencePieceTokenizer`: nothing is added to a text."""
    return PlainPieces(file, kind=settings.type, add_bos=False, eod_token=settings.eod_token)


def load_llama2(file: Path, settings: TokenizerSettings) -> PlainPieces:
    """`Llama2Tokenizer`: BOS in front of every text."""
    return PlainPieces(file, kind=settings.type, add_bos=True, eod_token=settings.eod_token)


def load_marked(file: Path, settings: TokenizerSettings) -> MarkedPieces:
    """`SentencePieceTokenizer`."""
    return MarkedPieces(file, kind=settings.type, extra_ids=settings.vocab_extra_ids)


def _load(file: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"--tokenizer-model {file} is not a SentencePiece model{_hint(file)}") from error


def _hint(file: Path) -> str:
    head = file.read_bytes()[:200]
    if head.lstrip()[:1] in (b"{", b"["):
        return ": it is JSON; tokenizer.json is read by --tokenizer-type HuggingFaceTokenizer"
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", head):
        return ": it is a tiktoken file, as LLaMA 3 has it; use --tokenizer-type Llama3Tokenizer"
    return ""


def _ids(model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    try:
        ids: list[int] = model.encode_as_ids(text)
    except (UnicodeEncodeError, TypeError, RuntimeError) as error:
        require_unicode(text)
        raise TextError(f"cannot be encoded: {error}") from error
    return ids


def _or_none(number: int) -> int | None:
    return number if number >= 0 else None
