"""The optional `gigatoken` library behind the same tokenizer files, for the tokenizers whose ids it is known to match.

gigatoken encodes 50 to 200 times faster than `tokenizers` and `sentencepiece`. `obstacle` is a list of what is allowed
rather than of what is not: the forms of tokenizers over which tests/tokenizer/test_engine.py compares the ids. Left out
with reason: the character maps of SentencePiece, and added tokens that take white space along. The libraries carry
tables of different versions of Unicode, by which text is cut into words and normalized; texts with characters that
these might disagree on go to the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from megatron.tokenizer.base import TextError, Tokenizer, require_unicode
from megatron.tokenizer.characters import changeable, finder, unknown
from megatron.tokenizer.flat import FlatEncoder, FlatIds, ListEncoder, interleave, wrap

if TYPE_CHECKING:  # Each needs a library that the other does not.
    from megatron.tokenizer.huggingface import FastTokenizer
    from megatron.tokenizer.pieces import PlainPieces

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _cl100k(digits: str) -> str:
    return rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"


def _o200k(digits: str, contractions: str) -> str:
    words = rf"{_LEAD}{_UPPER}*{_LOWER}+{contractions}|{_LEAD}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"


# How the published byte-level tokenizers cut text: LLaMA 3 and GPT-4, Qwen, GPT-4o, and Mistral's Tekken.
SPLIT_PATTERNS = frozenset(
    {
        _cl100k(r"\p{N}{1,3}"),
        _cl100k(r"\p{N}"),
        _o200k(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),
        _o200k(r"\p{N}", ""),
    }
)
_NFC = {"type": "NFC"}
_META = "\u2581"
_PIECES_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _META},
        {"type": "Replace", "pattern": {"String": " "}, "content": _META},
    ],
}
_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# Printable bytes stand for themselves in a byte-level vocabulary, the other 68 for the characters from U+0100 on.
_BYTE_CHARACTERS = frozenset(
    map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)])
)


def version() -> str | None:
    """The version that is installed."""
    try:
        return metadata.version("gigatoken")
    except metadata.PackageNotFoundError:
        return None


def obstacle(tokenizer: Tokenizer) -> str | None:
    """Why gigatoken may not stand in for this tokenizer; None where it may."""
    kind = type(tokenizer).__name__
    if kind == "FastTokenizer":
        backend = cast("FastTokenizer", tokenizer).backend
        if backend.encode_special_tokens:
            return "split_special_tokens is set"
        return json_obstacle(json.loads(backend.to_str()))
    if kind == "PlainPieces":
        return _pieces_obstacle(cast("PlainPieces", tokenizer).model_proto())
    return f"no fast engine is known for {tokenizer.name.split()[0]}"


def json_obstacle(config: Mapping[str, Any]) -> str | None:
    """`obstacle` of the content of a tokenizer.json."""
    model, normalizer = config["model"], config.get("normalizer")
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its BPE has dropout, a prefix or a suffix"
    for token in config.get("added_tokens", ()):
        if token["lstrip"] or token["rstrip"] or token["single_word"] or (token["normalized"] and normalizer):
            return f"its added token {token['content']!r} takes white space along or is normalized"
    if model.get("byte_fallback"):
        if normalizer != _PIECES_NORMALIZER or config.get("pre_tokenizer") is not None:
            return "it changes or cuts text before byte-fallback BPE in a way that is not known to agree"
        return None if model["vocab"].keys() >= _BYTE_PIECES else "its vocabulary lacks bytes"
    if normalizer not in (None, _NFC):
        return f"it normalizes text ({normalizer['type']})"
    if not _is_known_split(config.get("pre_tokenizer") or {}):
        return "it cuts text into words in a way that is not known to agree"
    return None if model["vocab"].keys() >= _BYTE_CHARACTERS else "its vocabulary lacks bytes"


def _is_known_split(cutter: Mapping[str, Any]) -> bool:
    if cutter.get("type") == "ByteLevel":
        return bool(cutter["use_regex"])
    steps = cutter.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, level = steps
    isolated = split["behavior"] == "Isolated" and not split["invert"]
    plain = not level["use_regex"] and not level["add_prefix_space"]
    return isolated and plain and split["pattern"].get("Regex") in SPLIT_PATTERNS


def _pieces_obstacle(proto: bytes) -> str | None:
    try:
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError:
        return "reading a SentencePiece model closely needs the Python package protobuf"
    model = schema.ModelProto.FromString(proto)
    if model.trainer_spec.model_type != schema.TrainerSpec.BPE or not model.trainer_spec.byte_fallback:
        return "its SentencePiece model is not BPE with byte fallback"
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        return "its SentencePiece model normalizes text"
    if any(piece.type == schema.ModelProto.SentencePiece.USER_DEFINED for piece in model.pieces):
        return "its SentencePiece model has user-defined pieces"
    return None


class GigatokenEncoder:
    """Encodes with gigatoken, and what it would read differently with the tokenizer itself."""

    def __init__(self, tokenizer: FastTokenizer | PlainPieces) -> None:
        """Load the library; only for tokenizers without an `obstacle`."""
        self._own: FlatEncoder = ListEncoder(tokenizer)
        self._is_marked: Callable[[str], bool] | None = None
        if type(tokenizer).__name__ == "FastTokenizer":
            config = json.loads(cast("FastTokenizer", tokenizer).backend.to_str())
            if config.get("normalizer") == _NFC:
                # Most texts are in this form and need no table to tell.
                self._is_marked = finder(changeable())
                config["normalizer"] = None
            elif not config["model"].get("byte_fallback"):
                self._is_marked = finder(unknown())
            self._engine = _engine_of_json(json.dumps(config))
        else:
            tokenizer = cast("PlainPieces", tokenizer)
            self._engine = _engine_of_pieces(tokenizer.model_proto())
            # gigatoken takes a spelled-out `</s>` for the token, SentencePiece for text.
            search = re.compile("|".join(map(re.escape, tokenizer.marks))).search
            self._is_marked = lambda text: search(text) is not None
        self._before, self._after = tokenizer.surroundings()

    def __call__(self, texts: Sequence[str]) -> FlatIds:
        """Ids of every text."""
        if self._is_marked is not None:
            marked = np.fromiter(map(self._is_marked, texts), np.bool_, len(texts))
            if marked.any():
                plain = [text for text, mark in zip(texts, marked, strict=True) if not mark]
                others = [text for text, mark in zip(texts, marked, strict=True) if mark]
                return interleave(self(plain), self._own(others), marked)
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            for text in texts:
                require_unicode(text)
            raise TextError(f"cannot be encoded: {error}") from error
        if not encoded:
            return FlatIds(np.empty(0, np.uint32), np.empty(0, np.int64))
        layout = self._engine(encoded, parallel=False).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return wrap(FlatIds(ids, np.diff(offsets)), self._before, self._after)


def _engine_of_json(config: str) -> Callable[..., Any]:
    import gigatoken

    engine: Callable[..., Any] = gigatoken.Tokenizer.from_json(config).encode_batch
    return engine


def _engine_of_pieces(proto: bytes) -> Callable[..., Any]:
    import gigatoken

    engine: Callable[..., Any] = gigatoken.Tokenizer.from_sentencepiece(proto).encode_batch
    return engine
