"""From a chunk of records to token arrays. This is what worker processes run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from megatron.data.index_file import token_dtype
from megatron.data.preprocess import layouts
from megatron.data.preprocess.documents import Document, Record, RecordError
from megatron.data.preprocess.handlers import HandlerSettings, build_handler
from megatron.data.preprocess.inputs import Chunk, Place, RecordKind, records
from megatron.data.preprocess.layouts import Columns, Form
from megatron.tokenizer import TextError, Tokenizer, TokenizerSettings, build_tokenizer
from megatron.tokenizer.engine import Engine, load_encoder
from megatron.tokenizer.flat import FlatEncoder, FlatIds, join, prepend, select, strip


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """What every worker needs to know.

    Attributes:
        tokenizer: settings of the tokenizer.
        handler: what a record means.
        append_eod: whether the end-of-document token follows every document.
        form: how instruction data is written.
        engine: what turns text into ids; the ids do not depend on it.
    """

    tokenizer: TokenizerSettings
    handler: HandlerSettings
    append_eod: bool
    form: Form = "packed"
    engine: Engine = "own"


@dataclass(frozen=True)
class BadRecord:
    """A record that is left out: `source` and `line`, the kind of problem for counting, and what exactly is wrong."""

    source: str
    line: int
    problem: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.problem}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result of one chunk: datasets in the order of the records, and what was wrong with the others."""

    datasets: Columns
    bad: tuple[BadRecord, ...]
    records: int
    text_bytes: int
    consumed: int
    end: Place


@dataclass(frozen=True)
class _Batch:
    """Documents of the good records of a chunk: `rows` [records][columns][documents], and the line of each record."""

    lines: list[int]
    rows: list[list[list[Document]]]
    bad: list[BadRecord]


class Encoder:
    """Encodes chunks. It holds a loaded tokenizer, so every process builds its own."""

    def __init__(self, plan: EncodePlan) -> None:
        """Load the tokenizer of the plan."""
        self.tokenizer: Tokenizer = build_tokenizer(plan.tokenizer)
        self.handler = build_handler(plan.handler)
        self.layout = layouts.build_layout(
            self.handler, plan.form, token_dtype(self.tokenizer.vocab_size), self.tokenizer.eod
        )
        self._encode: FlatEncoder = load_encoder(self.tokenizer, plan.engine)
        self._append_eod = plan.append_eod or self.handler.always_ends
        before, after = self.tokenizer.surroundings()
        self._around = (len(before), len(after))
        # A chat template may spell out the BOS that the tokenizer would put in front once more.
        self._spelled = self.tokenizer.decode(before) if before and self.handler.columns is None else ""

    def texts(self, chunk: Chunk) -> list[str]:
        """The texts of a chunk, as they would be encoded."""
        batch = self._read(chunk)
        return [segment.text for row in batch.rows for column in row for document in column for segment in document]

    def __call__(self, chunk: Chunk) -> Encoded:
        """Encode one chunk. A record is left out for all columns or for none, so that datasets stay aligned."""
        batch = self._read(chunk)
        columns = [self._encode_column([row[i] for row in batch.rows]) for i in range(self.layout.width)]
        problems: dict[int, RecordError] = {}
        for column in columns:
            problems = {**column.problems, **problems}
        kept = np.ones(len(batch.rows), np.bool_)
        kept[list(problems)] = False
        bad = [
            BadRecord(chunk.source, batch.lines[row], error.problem, error.detail) for row, error in problems.items()
        ]
        finished = [column.finish(kept, self.tokenizer.eod if self._append_eod else None) for column in columns]
        return Encoded(
            datasets=self.layout(finished),
            bad=tuple(sorted([*batch.bad, *bad], key=lambda record: record.line)),
            records=int(kept.sum()),
            text_bytes=len(chunk.data),
            consumed=chunk.consumed,
            end=chunk.end,
        )

    def _read(self, chunk: Chunk) -> _Batch:
        batch = _Batch([], [], [])
        for line, data in records(chunk):
            try:
                batch.rows.append(self.handler(_record(data, chunk.kind)))
                batch.lines.append(line)
            except RecordError as error:
                batch.bad.append(BadRecord(chunk.source, line, error.problem, error.detail))
        return batch

    def _encode_column(self, rows: Sequence[list[Document]]) -> _Column:
        """All documents of one column."""
        documents = list(chain.from_iterable(rows))
        segments = list(chain.from_iterable(documents))
        flat, errors = encode_kept(self._encode, [segment.text for segment in segments])
        counts = np.fromiter(map(len, documents), np.int64, len(documents))
        first = _starts(counts, len(segments))
        if self._around != (0, 0):
            flat = self._without_inner(flat, first, [segment.text for segment in segments])
        owners = np.repeat(np.arange(len(rows)), np.fromiter(map(len, rows), np.int64, len(rows)))
        markers = np.fromiter((-1 if s.marker is None else s.marker for s in segments), np.int64, len(segments))
        flat = prepend(flat, markers, markers >= 0)
        column = _Column(
            flat=flat,
            counts=counts,
            owners=owners,
            trained=np.fromiter((s.trained for s in segments), np.bool_, len(segments)),
            ends=np.fromiter((s.marker_is_end for s in segments), np.bool_, len(segments)),
            marked=markers >= 0,
            problems={},
        )
        column.find_problems(errors, instruct=self.handler.columns is None)
        return column

    def _without_inner(self, flat: FlatIds, first: npt.NDArray[np.bool_], texts: Sequence[str]) -> FlatIds:
        """What a tokenizer puts around every text belongs around documents only."""
        before, after = self._around
        last = np.append(first[1:], True) if len(first) else first
        whole = flat.lengths >= before + after
        spelled = np.zeros(len(texts), np.bool_)
        if self._spelled:
            spelled = np.fromiter((text.startswith(self._spelled) for text in texts), np.bool_, len(texts))
        return strip(flat, before * (whole & (~first | spelled)), after * (whole & ~last))


@dataclass(frozen=True, kw_only=True)
class _Column:
    """Encoded documents: `flat`, `trained`, `ends`, `marked` per segment, `counts`, `owners` (record) per document."""

    flat: FlatIds
    counts: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.bool_]
    marked: npt.NDArray[np.bool_]
    problems: dict[int, RecordError]

    def find_problems(self, errors: Mapping[int, str], *, instruct: bool) -> None:
        """Fill `problems`: what is wrong with records, by number."""
        of_segment = np.repeat(self.owners, self.counts)
        for segment, message in errors.items():
            self.problems.setdefault(int(of_segment[segment]), RecordError("invalid text", message))
        documents = np.repeat(np.arange(len(self.counts)), self.counts)
        sizes = np.bincount(documents, self.flat.lengths, len(self.counts))
        for document in np.flatnonzero(sizes == 0).tolist():
            self.problems.setdefault(int(self.owners[document]), RecordError("empty", "gives no tokens"))
        if instruct:
            answers = np.bincount(documents, self.flat.lengths * self.trained, len(self.counts))
            for document in np.flatnonzero(answers == 0).tolist():
                self.problems.setdefault(int(self.owners[document]), RecordError("empty", "the answer gives no tokens"))

    def finish(self, kept: npt.NDArray[np.bool_], eod: int | None) -> layouts.Finished:
        """The documents of the records that are kept, each with an EOD if there is one."""
        whole = kept[self.owners]
        segments = np.repeat(whole, self.counts)
        return layouts.Finished(
            flat=select(self.flat, segments),
            counts=self.counts[whole],
            trained=self.trained[segments],
            ends=self.ends[segments],
            marked=self.marked[segments],
            eod=eod,
        )


def encode_kept(encode: FlatEncoder, texts: Sequence[str]) -> tuple[FlatIds, dict[int, str]]:
    """Ids of every text; a text that cannot be encoded has none, and the reason is given by its number."""
    try:
        return encode(texts), {}
    except TextError as error:
        if len(texts) == 1:
            return FlatIds(np.empty(0, np.int32), np.zeros(1, np.int64)), {0: str(error)}
    middle = len(texts) // 2
    (left, errors), (right, others) = encode_kept(encode, texts[:middle]), encode_kept(encode, texts[middle:])
    return join([left, right]), {**errors, **{number + middle: reason for number, reason in others.items()}}


def _starts(counts: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.bool_]:
    """[segments]: whether a document starts there."""
    first = np.zeros(total, np.bool_)
    first[(np.cumsum(counts) - counts)[counts > 0]] = True
    return first


def _record(data: bytes, kind: RecordKind) -> Record:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError("invalid UTF-8", f"byte 0x{data[error.start]:02x} at offset {error.start}") from None
    if kind != "json":
        return {"text": text}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError("invalid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise RecordError("invalid JSON", f"a {type(record).__name__}, not an object")
    return record
