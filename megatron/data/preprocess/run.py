"""Turns text files into Megatron's .bin/.idx datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, TextIO

import numpy as np

from megatron.data.errors import DataError
from megatron.data.index_file import token_dtype
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.preprocess.encode import BadRecord, Documents, Encoded, EncodePlan, Encoder
from megatron.data.preprocess.inputs import find_inputs, read_chunks
from megatron.data.preprocess.pool import ordered_map
from megatron.data.preprocess.progress import Progress
from megatron.tokenizer import build_tokenizer

_EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What to preprocess and how.

    Attributes:
        inputs: files and glob patterns.
        output_prefix: `{output_prefix}_{key}_document.bin` and `.idx` are written.
        plan: how a record becomes tokens.
        workers: processes that encode; the output does not depend on their number.
        text_unit: whether a .txt file holds a document per line or is one document.
        on_error: `fail` ends at the first bad record, `skip` leaves bad records out and counts them.
        log_interval: documents between two progress lines in a log.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    plan: EncodePlan
    workers: int = 1
    text_unit: Literal["line", "file"] = "line"
    on_error: Literal["fail", "skip"] = "fail"
    log_interval: int = 1000

    def __post_init__(self) -> None:
        """Refuse numbers and keys that make no sense."""
        for flag, number in (("--workers", self.workers), ("--log-interval", self.log_interval)):
            if number < 1:
                raise DataError(f"{flag} {number}: must be at least 1")
        if len(set(self.plan.keys)) != len(self.plan.keys):
            raise DataError(f"--json-keys names a key twice: {' '.join(self.plan.keys)}")


@dataclass(kw_only=True)
class Summary:
    """What was done: datasets by key, documents and tokens in each, and what was left out."""

    prefixes: dict[str, Path]
    documents: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[BadRecord] = field(default_factory=list)
    last_line: str = ""

    def count(self, encoded: Encoded) -> None:
        """Add the result of one chunk."""
        for key, documents in encoded.documents.items():
            self.tokens[key] += len(documents.tokens)
        self.documents += _count(encoded)
        self.skipped.update(record.problem for record in encoded.bad)
        self.examples += encoded.bad[: _EXAMPLES - len(self.examples)]

    def skipped_lines(self) -> Iterator[str]:
        """Sentences about the records that were left out; none if all were taken."""
        if not self.skipped:
            return
        kinds = ", ".join(f"{number} {problem}" for problem, number in sorted(self.skipped.items()))
        yield f"Skipped {self.skipped.total()} of {self.skipped.total() + self.documents} records: {kinds}."
        yield from (f"  {record}" for record in self.examples)
        if self.skipped.total() > len(self.examples):
            yield f"  ... and {self.skipped.total() - len(self.examples)} more"


def preprocess(settings: PreprocessSettings, *, log: TextIO) -> Summary:
    """Encode all inputs and publish one dataset per key; on any error, none.

    Args:
        settings: what to do.
        log: where progress is written.

    Raises:
        DataError: an input cannot be read, a record is bad and `on_error` is `fail`, or there is no document.
        TokenizerError: the tokenizer cannot be built.
        WorkerError: a worker process failed.
    """
    files = find_inputs(settings.inputs)
    keys = settings.plan.keys
    if keys != ("text",) and any(file.name.removesuffix(".gz").endswith(".txt") for file in files):
        raise DataError(f"--json-keys {' '.join(keys)}: .txt files have no keys; leave the flag out for them")
    dtype = token_dtype(build_tokenizer(settings.plan.tokenizer).vocab_size)
    summary = Summary(prefixes={key: Path(f"{settings.output_prefix}_{key}_document") for key in keys})
    progress = Progress(log, total_bytes=sum(file.stat().st_size for file in files), log_interval=settings.log_interval)
    Path(settings.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    chunks = chain.from_iterable(read_chunks(file, text_unit=settings.text_unit) for file in files)
    with ExitStack() as stack:
        stack.callback(progress.close)
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(prefix, dtype)) for key, prefix in summary.prefixes.items()
        }
        encode = partial(Encoder, settings.plan)
        # Closing ends the workers when a bad record ends the run, before the error travels on.
        results = stack.enter_context(closing(ordered_map(encode, chunks, workers=settings.workers)))
        for encoded in results:
            if encoded.bad and settings.on_error == "fail":
                raise DataError(f"{encoded.bad[0]}. --on-error skip leaves such records out and counts them")
            for key, documents in encoded.documents.items():
                _write(writers[key], documents)
            summary.count(encoded)
            progress.add(documents=_count(encoded), text_bytes=encoded.text_bytes, consumed=encoded.consumed)
        if not summary.documents:
            raise DataError("\n".join([f"no documents in {_names(files)}", *summary.skipped_lines()]))
    summary.last_line = progress.line()
    return summary


def _count(encoded: Encoded) -> int:
    """Records that became documents: the same number for every key."""
    return max(len(documents.lengths) for documents in encoded.documents.values())


def _write(writer: IndexedDatasetWriter, documents: Documents) -> None:
    ends = np.cumsum(documents.lengths)
    for end, length in zip(ends, documents.lengths, strict=True):
        writer.add_document(documents.tokens[end - length : end])


def _names(files: list[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
