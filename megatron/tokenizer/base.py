"""The interface every tokenizer has, its errors, and what the implementations share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


class TokenizerError(ValueError):
    """A tokenizer cannot be built from what was asked, or does not fit the data."""


class TextError(ValueError):
    """One text cannot be encoded; the tokenizer itself is fine."""


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into token ids and back.

    `eod` ends a document in a dataset; `bos`, `eos` and `pad` are None where the tokenizer has no such token.
    Ids are in [0, vocab_size).
    """

    name: str
    vocab_size: int
    eod: int
    bos: int | None
    eos: int | None
    pad: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of one text. Raises `TextError` for a text that cannot be encoded."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same ids as `encode` of every text, faster. Raises `TextError` if any of them cannot be encoded."""
        ...

    def surroundings(self) -> tuple[list[int], list[int]]:
        """The ids that `encode` puts in front of every text and behind it, such as BOS."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal hash of everything the ids depend on: file contents and settings, not paths."""
        ...


def require_file(path: str | None, *, flag: str, kind: str) -> Path:
    """The file a flag names.

    Raises:
        TokenizerError: the flag is missing, or names something that is not a readable file.
    """
    if path is None:
        raise TokenizerError(f"{kind} needs {flag}, which was not given")
    file = Path(path)
    if file.is_dir():
        raise TokenizerError(f"{flag} {path} is a folder; {kind} needs a file")
    if not file.is_file():
        raise TokenizerError(f"{flag} {path}: no such file")
    return file


def read_json(file: Path, *, flag: str, expected: str) -> Any:
    """The content of a JSON file.

    Raises:
        TokenizerError: it is not JSON; `expected` says what it should have been.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"{flag} {file} is not {expected}: {error}") from error


def fingerprint_of(kind: str, files: Iterable[Path], settings: Mapping[str, object]) -> str:
    """SHA-256 over the kind, the settings by name and the contents of the files in order."""
    digest = hashlib.sha256(json.dumps([kind, dict(settings)], sort_keys=True).encode())
    for file in files:
        content = hashlib.sha256(file.read_bytes())
        digest.update(content.digest())
    return digest.hexdigest()


def require_unicode(text: str) -> None:
    """Raises `TextError` for a text with half of a surrogate pair, which no UTF-8 tokenizer can represent."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"is not valid Unicode: lone surrogate at character {error.start}") from error


def refuse_eod(kind: str, found: Sequence[str]) -> TokenizerError:
    """The error for a tokenizer that does not say which token ends a document."""
    known = f"its special tokens are {', '.join(found[:20])}" if found else "it has no special tokens"
    return TokenizerError(
        f"{kind}: nothing says which token ends a document ({known}); name one with --eod-token, "
        "or set eos_token in tokenizer_config.json"
    )
