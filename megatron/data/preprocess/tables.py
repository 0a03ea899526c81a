"""Inputs whose records are rows: csv, parquet, arrow, JSON arrays, Hugging Face datasets. Rows become JSON lines."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron.data.errors import DataError
from megatron.data.preprocess import streams

ENDINGS = (".csv", ".tsv", ".parquet", ".arrow")
_ROWS = 1000
_PIECE = 1 << 20
Rows = Iterator[tuple[Mapping[str, Any], int]]


def is_table(name: str) -> bool:
    """Whether the name says that it is a table."""
    return streams.plain_name(name).endswith(ENDINGS)


def is_array(stream: BinaryIO) -> bool:
    """Whether a stream of JSON starts with an array instead of an object."""
    return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def read_rows(name: str, form: str, start: int, chunk_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """Chunks of JSON lines: the bytes, the rows in them, and the bytes read from the disk for them.

    Args:
        name: of the input.
        form: of the input, see `inputs.Input`.
        start: rows to leave out.
        chunk_bytes: size from which on a chunk is given out.

    Raises:
        DataError: a library is missing, or the input is damaged.
    """
    lines: list[bytes] = []
    size = before = 0
    for row, position in _rows(name, form, start):
        lines.append(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
        size += len(lines[-1])
        if size >= chunk_bytes:
            yield b"\n".join(lines), len(lines), position - before
            lines, size, before = [], 0, position
    if lines:
        yield b"\n".join(lines), len(lines), 0


def _rows(name: str, form: str, start: int) -> Rows:
    if form in ("saved", "hub", "described"):
        return _dataset(name, form, start)
    kind = streams.plain_name(name)
    if kind.endswith((".csv", ".tsv")):
        return _csv(name, "\t" if kind.endswith(".tsv") else ",", start)
    if kind.endswith(".parquet"):
        return _parquet(name, start)
    if kind.endswith(".arrow"):
        return _arrow(name, start)
    return _array(name, start)


def _csv(name: str, delimiter: str, start: int) -> Rows:
    csv.field_size_limit(sys.maxsize)
    with streams.open_input(name) as raw, streams.decompressed(raw, name) as stream:
        text = io.TextIOWrapper(cast("Any", stream), encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            for row in islice(csv.DictReader(text, delimiter=delimiter, strict=True), start, None):
                if None in row or None in row.values():
                    raise DataError(f"{name} is damaged: a row has more or fewer fields than the header")
                yield row, raw.tell()
        except csv.Error as error:
            raise DataError(f"{name} is no valid csv: {error}") from error


def _parquet(name: str, start: int) -> Rows:
    parquet = streams.optional("pyarrow.parquet", "pyarrow", f"reading {name}")
    errors = streams.optional("pyarrow", "pyarrow", name).ArrowException
    try:
        with streams.open_input(name) as raw:
            file = parquet.ParquetFile(raw)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if rows <= start:
                    start -= rows
                    continue
                batches = file.iter_batches(batch_size=_ROWS, row_groups=[group])
                yield from _counted(_rows_of(batches, start), raw)
                start = 0
    except errors as error:
        raise DataError(f"{name} is no valid parquet file: {error}") from error


def _arrow(name: str, start: int) -> Rows:
    arrow = streams.optional("pyarrow", "pyarrow", f"reading {name}")
    try:
        with streams.open_input(name) as raw:
            is_file = raw.read(6) == b"ARROW1"
            raw.seek(0)
            if is_file:
                file = arrow.ipc.open_file(raw)
                batches: Iterable[Any] = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                batches = arrow.ipc.open_stream(raw)
            yield from _counted(_rows_of(batches, start), raw)
    except arrow.ArrowException as error:
        raise DataError(f"{name} is no valid arrow file: {error}") from error


def _rows_of(batches: Iterable[Any], start: int) -> Iterator[Mapping[str, Any]]:
    for batch in batches:
        for first in range(start, len(batch), _ROWS):
            yield from batch.slice(first, _ROWS).to_pylist()
        start = max(0, start - len(batch))


def _counted(rows: Iterable[Mapping[str, Any]], raw: BinaryIO) -> Rows:
    for row in rows:
        yield row, raw.tell()


def _array(name: str, start: int) -> Rows:
    with streams.open_input(name) as raw, streams.decompressed(raw, name) as stream:
        text = io.TextIOWrapper(cast("Any", stream), encoding="utf-8-sig", errors="surrogateescape")
        for number, row in enumerate(_values(text, name)):
            if number >= start:
                yield row, raw.tell()


def _values(text: io.TextIOWrapper, name: str) -> Iterator[Any]:
    """The values of a JSON array, without holding all of it."""
    decoder = json.JSONDecoder()
    buffer, place, count = text.read(_PIECE).lstrip()[1:], 0, 0
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(buffer, place)
            complete = end < len(buffer)
        except ValueError as error:
            problem, complete = error, False
        else:
            problem = ValueError("the array has no end")
        if complete:
            yield value
            place, count = end, count + 1
            continue
        more = text.read(max(_PIECE, len(buffer) - place))
        if not more:
            raise DataError(f"{name} is no valid JSON array, near value {count + 1}: {problem}")
        buffer, place = buffer[place:] + more, 0


def _dataset(name: str, form: str, start: int) -> Rows:
    data = _load_dataset(name, form)
    if not hasattr(data, "__len__"):  # a stream, asked for with "streaming": true
        yield from ((row, 0) for row in data.skip(start))
        return
    total = sum(file.stat().st_size for file in Path(name).rglob("*.arrow")) if form == "saved" else 0
    for first in range(start, len(data), _ROWS):
        columns = data[first : first + _ROWS]
        for place, values in enumerate(zip(*columns.values(), strict=True)):
            yield dict(zip(columns, values, strict=True)), total * (first + place + 1) // len(data)


def _load_dataset(name: str, form: str) -> Any:
    """One split of a Hugging Face dataset: saved in a folder, on the hub, or described by a JSON file."""
    datasets = streams.optional("datasets", "datasets", f"reading {name}")
    described = _described(name) if form == "described" else {"path": name, "split": "train"}
    try:
        data = datasets.load_from_disk(name) if form == "saved" else datasets.load_dataset(**described)
    except Exception as error:  # The library raises what its many parts raise.
        raise DataError(f"{name} cannot be read as a Hugging Face dataset: {error}") from error
    if isinstance(data, dict):
        first = next(iter(data))
        how = f'with "split": "{first}" in it' if form == "described" else f"as in {Path(name) / first}"
        raise DataError(f"{name} holds the splits {', '.join(data)}: name one, {how}")
    return data


def _described(name: str) -> dict[str, Any]:
    try:
        described = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--hf-datasets-params {name} is no readable JSON file: {error}") from error
    if not isinstance(described, dict) or "path" not in described:
        raise DataError(
            f"--hf-datasets-params {name} must be a JSON object with the arguments of datasets.load_dataset, "
            'at least "path"'
        )
    return described
