"""From a chunk of records to token arrays. This is what worker processes run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from megatron.data.index_file import token_dtype
from megatron.data.preprocess.inputs import Chunk, RecordKind, records
from megatron.tokenizer import TextError, Tokenizer, TokenizerSettings, build_tokenizer

# More texts at a time make encode_batch no faster, and keep more results of the library in memory.
_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """What every worker needs to know.

    Attributes:
        tokenizer: settings of the tokenizer.
        keys: fields of a JSON record, each of which becomes a dataset. Text files have the one key `text`.
        append_eod: whether the end-of-document token follows every document.
    """

    tokenizer: TokenizerSettings
    keys: tuple[str, ...]
    append_eod: bool


@dataclass(frozen=True)
class BadRecord:
    """A record that is left out: `source` and `line`, the kind of problem for counting, and what exactly is wrong."""

    source: str
    line: int
    problem: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.problem}: {self.detail}"


@dataclass(frozen=True)
class Documents:
    """Documents of one key: `tokens` [sum of lengths] one after the other, `lengths` [documents] in tokens."""

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result of one chunk: documents by key in the order of the records, and what was wrong with the others."""

    documents: dict[str, Documents]
    bad: tuple[BadRecord, ...]
    text_bytes: int
    consumed: int


class _Problem(Exception):
    """Why one record is bad: the kind of problem for counting, and what exactly is wrong."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(problem, detail)
        self.problem = problem
        self.detail = detail


class Encoder:
    """Encodes chunks. It holds a loaded tokenizer, so every process builds its own."""

    def __init__(self, plan: EncodePlan) -> None:
        """Load the tokenizer of the plan."""
        self._plan = plan
        self._tokenizer = build_tokenizer(plan.tokenizer)
        self._dtype = token_dtype(self._tokenizer.vocab_size)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Encode one chunk. A record is left out for all keys or for none, so that the datasets stay aligned."""
        lines: list[int] = []
        texts: list[tuple[str, ...]] = []
        bad: list[BadRecord] = []
        for line, record in records(chunk):
            try:
                texts.append(_texts(record, chunk.kind, self._plan.keys))
                lines.append(line)
            except _Problem as error:
                bad.append(BadRecord(chunk.source, line, error.problem, error.detail))
        kept: list[tuple[list[int], ...]] = []
        for line, ids in zip(lines, self._encode(texts), strict=True):
            if isinstance(ids, _Problem):
                bad.append(BadRecord(chunk.source, line, ids.problem, ids.detail))
            else:
                kept.append(ids)
        columns = zip(*kept, strict=True) if kept else [() for _ in self._plan.keys]
        return Encoded(
            documents={key: self._pack(column) for key, column in zip(self._plan.keys, columns, strict=True)},
            bad=tuple(sorted(bad, key=lambda record: record.line)),
            text_bytes=len(chunk.data),
            consumed=chunk.consumed,
        )

    def _encode(self, texts: Sequence[tuple[str, ...]]) -> Iterator[tuple[list[int], ...] | _Problem]:
        """Ids of every record, or what is wrong with it."""
        width = len(self._plan.keys)
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            try:
                flat = self._tokenizer.encode_batch(list(chain.from_iterable(batch)))
                rows = [tuple(flat[i : i + width]) for i in range(0, len(flat), width)]
            except TextError:
                yield from (_encode_alone(self._tokenizer, row) for row in batch)
                continue
            yield from (row if all(row) else _Problem("empty", "gives no tokens") for row in rows)

    def _pack(self, column: Sequence[list[int]]) -> Documents:
        if self._plan.append_eod:
            column = [[*ids, self._tokenizer.eod] for ids in column]
        lengths = np.fromiter(map(len, column), np.int64, len(column))
        tokens = np.fromiter(chain.from_iterable(column), self._dtype, int(lengths.sum()))
        return Documents(tokens, lengths)


def _encode_alone(tokenizer: Tokenizer, row: tuple[str, ...]) -> tuple[list[int], ...] | _Problem:
    try:
        ids = tuple(tokenizer.encode(text) for text in row)
    except TextError as error:
        return _Problem("invalid text", str(error))
    return ids if all(ids) else _Problem("empty", "gives no tokens")


def _texts(record: bytes, kind: RecordKind, keys: Sequence[str]) -> tuple[str, ...]:
    """The texts of one record, in the order of the keys."""
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Problem("invalid UTF-8", f"byte 0x{record[error.start]:02x} at offset {error.start}") from None
    if kind != "json":
        found: tuple[str, ...] = (text,)
    else:
        found = _fields(text, keys)
    for key, value in zip(keys, found, strict=True):
        if not value:
            raise _Problem("empty", f"the text of {key!r} is empty")
    return found


def _fields(text: str, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Problem("invalid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise _Problem("invalid JSON", f"a {type(record).__name__}, not an object")
    for key in keys:
        if key not in record:
            raise _Problem("missing key", f"no {key!r}; it has {', '.join(map(repr, list(record)[:10])) or 'nothing'}")
        if not isinstance(record[key], str):
            raise _Problem("not text", f"{key!r} is a {type(record[key]).__name__}, not a string")
    return tuple(record[key] for key in keys)
