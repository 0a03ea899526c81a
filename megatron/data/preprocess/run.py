"""Turns text files into Megatron's .bin/.idx datasets."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from megatron.data.errors import DataError
from megatron.data.preprocess.encode import BadRecord, Encoded, EncodePlan, Encoder
from megatron.data.preprocess.inputs import Chunk, Input, Place, find_inputs, read_chunks
from megatron.data.preprocess.journal import Entry, Journal
from megatron.data.preprocess.pool import ordered_map
from megatron.data.preprocess.progress import Progress
from megatron.data.unfinished import UnfinishedDataset, leftovers, publish
from megatron.tokenizer.engine import AskedEngine, choose_engine

_EXAMPLES = 10
_SAMPLED_INPUTS = 4
# Of the input, on which engines are compared: what Hugging Face's library encodes in a fraction of a second.
_SAMPLE_CHARACTERS = 400_000


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What to preprocess and how.

    Attributes:
        inputs: files, folders, glob patterns, URLs, names of datasets on the Hugging Face hub.
        hf_datasets_params: instead of inputs, a JSON file with the arguments of `datasets.load_dataset`.
        output_prefix: `{output_prefix}_{name}.bin` and `.idx` are written.
        plan: how a record becomes tokens.
        engine: what turns text into ids.
        workers: processes that encode; the output does not depend on their number.
        text_unit: whether a .txt file holds a document per line or is one document.
        on_error: `fail` ends at the first bad record, `skip` leaves bad records out and counts them.
        log_interval: documents between two progress lines in a log.
        resume_interval: seconds between two states from which a killed run goes on.
    """

    output_prefix: str
    plan: EncodePlan
    inputs: tuple[str, ...] = ()
    hf_datasets_params: str | None = None
    engine: AskedEngine = "auto"
    workers: int = 1
    text_unit: Literal["line", "file"] = "line"
    on_error: Literal["fail", "skip"] = "fail"
    log_interval: int = 1000
    resume_interval: float = 10.0

    def __post_init__(self) -> None:
        """Refuse numbers and keys that make no sense."""
        for flag, number in (("--workers", self.workers), ("--log-interval", self.log_interval)):
            if number < 1:
                raise DataError(f"{flag} {number}: must be at least 1")
        keys = self.plan.handler.keys
        if len(set(keys)) != len(keys):
            raise DataError(f"--json-keys names a key twice: {' '.join(keys)}")


@dataclass(kw_only=True)
class Summary:
    """What was done: datasets by name, records, documents and tokens in each, and what was left out."""

    prefixes: dict[str, Path]
    documents: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[BadRecord] = field(default_factory=list)
    last_line: str = ""

    def count(self, encoded: Encoded) -> None:
        """Add the result of one chunk."""
        for name, documents in encoded.datasets.items():
            self.tokens[name] += len(documents.tokens)
            self.written[name] += len(documents.counts)
        self.documents += encoded.records
        self.skipped.update(record.problem for record in encoded.bad)
        self.examples += encoded.bad[: _EXAMPLES - len(self.examples)]

    def as_counts(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {
            "documents": self.documents,
            "tokens": dict(self.tokens),
            "written": dict(self.written),
            "skipped": dict(self.skipped),
            "examples": [asdict(record) for record in self.examples],
        }

    def restore(self, counts: Any) -> None:
        """Go on from `as_counts`."""
        self.documents = counts["documents"]
        self.tokens, self.written, self.skipped = (Counter(counts[name]) for name in ("tokens", "written", "skipped"))
        self.examples = [BadRecord(**record) for record in counts["examples"]]

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
    """Encode all inputs and publish the datasets; on an error of the data, none.

    When the process is killed or interrupted, the same call later goes on where it was; the datasets are the same.

    Args:
        settings: what to do.
        log: where progress is written.

    Raises:
        DataError: an input cannot be read, a record is bad and `on_error` is `fail`, or there is no document.
        TokenizerError: the tokenizer cannot be built.
        WorkerError: a worker process failed.
    """
    described = settings.hf_datasets_params
    files = [Input(described, "described", 0)] if described else find_inputs(settings.inputs)
    handler = settings.plan.handler
    if (handler.keys != ("text",) or handler.name != "GeneralPretrainHandler") and any(
        file.is_lines_of_text for file in files
    ):
        raise DataError(f"--json-keys {' '.join(handler.keys)}, {handler.name}: .txt files have no keys")
    encoder = Encoder(settings.plan)
    plan = replace(settings.plan, engine=_choose(settings, encoder, files, log))
    Path(settings.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    job = _Job(replace(settings, plan=plan), files, encoder, log)
    with job.journal.held():
        return job.run()


def _choose(settings: PreprocessSettings, encoder: Encoder, files: list[Input], log: TextIO) -> Any:
    sample: list[str] = []
    if settings.engine != "own":
        step = max(1, len(files) // _SAMPLED_INPUTS)
        for number in range(0, len(files), step):
            for chunk in islice(read_chunks(files[number], number, text_unit=settings.text_unit), 1):
                sample += _first(encoder.texts(chunk), _SAMPLE_CHARACTERS // _SAMPLED_INPUTS)
    choice = choose_engine(encoder.tokenizer, settings.engine, sample)
    print(choice.line, file=log, flush=True)
    return choice.engine


def _first(texts: list[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


class _Job:
    """One run, from the journal's last entry to the publication."""

    def __init__(self, settings: PreprocessSettings, files: list[Input], encoder: Encoder, log: TextIO) -> None:
        self.settings = settings
        self.files = files
        self.layout = encoder.layout
        self.log = log
        self.summary = Summary(
            prefixes={name: Path(f"{settings.output_prefix}_{name}") for name in encoder.layout.names}
        )
        plan = asdict(settings.plan)
        plan = {key: value for key, value in plan.items() if key not in ("engine", "tokenizer")}
        self.journal = Journal(
            settings.output_prefix,
            {
                "inputs": [file.stamp for file in files],
                "tokenizer": encoder.tokenizer.fingerprint(),
                "settings": {**plan, "text_unit": settings.text_unit, "on_error": settings.on_error},
            },
        )

    def run(self) -> Summary:
        entry, line = self.journal.read()
        if line:
            print(line, file=self.log, flush=True)
        if entry is None:
            self._discard()
        else:
            self.summary.restore(entry.counts)
        if entry is None or entry.place is not None:
            entry = self._encode(entry)
        for (name, prefix), dtype in zip(self.summary.prefixes.items(), self.layout.dtypes, strict=True):
            publish(prefix, dtype, entry.marks[name])
        self.journal.remove()
        return self.summary

    def _encode(self, entry: Entry | None) -> Entry:
        """Everything from the entry on; the last entry, which says that only names are missing."""
        start = entry.place if entry is not None and entry.place is not None else Place()
        left = sum(file.size for file in self.files[start.number :])
        progress = Progress(self.log, total_bytes=left, log_interval=self.settings.log_interval)
        with ExitStack() as stack:
            stack.callback(progress.close)
            writers = {
                name: UnfinishedDataset(prefix, dtype, None if entry is None else entry.marks[name])
                for (name, prefix), dtype in zip(self.summary.prefixes.items(), self.layout.dtypes, strict=True)
            }
            try:
                self._write_all(writers, start, progress, stack)
                if not self.summary.documents:
                    raise DataError("\n".join([f"no documents in {_names(self.files)}", *self.summary.skipped_lines()]))
            except BaseException as error:
                for writer in writers.values():
                    writer.close()
                # Bad data ends a run for good. What was interrupted goes on from the last entry, if there is one.
                if isinstance(error, DataError) or not self.journal.exists():
                    self._discard()
                raise
            self.summary.last_line = progress.line()
            final = self._mark(writers, None)
            for writer in writers.values():
                writer.close()
            return final

    def _discard(self) -> None:
        self.journal.remove()
        for prefix in self.summary.prefixes.values():
            for path in leftovers(prefix):
                path.unlink()

    def _write_all(
        self, writers: dict[str, UnfinishedDataset], start: Place, progress: Progress, stack: ExitStack
    ) -> None:
        marked = time.monotonic()
        encode = partial(Encoder, self.settings.plan)
        # Closing ends the workers when a bad record ends the run, before the error travels on.
        chunks = _chunks(self.files, self.settings.text_unit, start)
        results = stack.enter_context(closing(ordered_map(encode, chunks, workers=self.settings.workers)))
        for encoded in results:
            if encoded.bad and self.settings.on_error == "fail":
                raise DataError(f"{encoded.bad[0]}. --on-error skip leaves such records out and counts them")
            for name, documents in encoded.datasets.items():
                writers[name].add(documents.tokens, documents.lengths, documents.counts)
            self.summary.count(encoded)
            tokens = max(len(documents.tokens) for documents in encoded.datasets.values())
            progress.add(
                documents=encoded.records, text_bytes=encoded.text_bytes, tokens=tokens, consumed=encoded.consumed
            )
            if time.monotonic() - marked >= self.settings.resume_interval:
                self._mark(writers, encoded.end)
                marked = time.monotonic()

    def _mark(self, writers: dict[str, UnfinishedDataset], place: Place | None) -> Entry:
        entry = Entry(
            place=place,
            marks={name: writer.mark() for name, writer in writers.items()},
            counts=self.summary.as_counts(),
        )
        self.journal.write(entry)
        return entry


def _chunks(files: list[Input], text_unit: Literal["line", "file"], start: Place) -> Iterator[Chunk]:
    for number in range(start.number, len(files)):
        place = start if number == start.number else Place(number=number)
        yield from read_chunks(files[number], number, text_unit=text_unit, start=place)


def _names(files: list[Input]) -> str:
    return ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
