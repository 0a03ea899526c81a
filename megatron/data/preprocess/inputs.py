"""From what `--input` says to pieces of text: which files, and how they are cut."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from megatron.data.errors import DataError
from megatron.data.preprocess import streams, tables

RecordKind = Literal["json", "line", "file"]

# Large enough that handing a chunk to a process costs nothing beside encoding it, small enough that the last chunks
# keep all workers busy and memory stays in the tens of megabytes.
CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TEXT_ENDINGS = (".jsonl", ".json", ".txt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where reading goes on: number of the input, and within it bytes (of tables: rows) and lines that are done."""

    number: int = 0
    offset: int = 0
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive records of one input, as bytes.

    Attributes:
        source: path of the input.
        first_line: number of the first line (of tables: row) in `data`, counted from 1.
        kind: what a record is: a JSON object on a line, a line of text, or all of `data`.
        data: whole lines, with their line ends.
        consumed: bytes of the input on disk that were read for this chunk (compressed bytes).
        end: the place behind it.
    """

    source: str
    first_line: int
    kind: RecordKind
    data: bytes
    consumed: int
    end: Place


@dataclass(frozen=True)
class Input:
    """One file, or one Hugging Face dataset: saved in a folder, on the hub, or described by a JSON file."""

    name: str
    form: Literal["text", "table", "saved", "hub", "described"]
    size: int

    @property
    def stamp(self) -> list[object]:
        """What tells a changed input from the same one."""
        path = Path(self.name)
        return [self.name, self.size, path.stat().st_mtime_ns if path.exists() else None]

    @property
    def is_lines_of_text(self) -> bool:
        """Whether it is plain text without keys."""
        return streams.plain_name(self.name).endswith(".txt")


def find_inputs(patterns: Iterable[str]) -> list[Input]:
    """What paths, glob patterns and folders name, in order; the matches of one pattern or folder are sorted.

    Raises:
        DataError: a pattern matches nothing, a folder holds no input, or an ending is not known.
    """
    found: list[Input] = []
    for pattern in patterns:
        if streams.is_remote(pattern):
            found += [_file(name) for name in streams.expand(pattern)]
            continue
        # Path.glob takes no absolute patterns, which is what people give.
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        if names:
            for name in names:
                found += _folder(Path(name)) if Path(name).is_dir() else [_file(name)]
        elif _HUB_NAME.fullmatch(pattern) and not streams.plain_name(pattern).endswith(
            (*_TEXT_ENDINGS, *tables.ENDINGS)
        ):
            found.append(Input(pattern, "hub", 0))
        else:
            raise DataError(f"--input {pattern}: no such file, and no file matches it as a pattern")
    return found


def _file(name: str) -> Input:
    form: Literal["text", "table"] = "table" if tables.is_table(name) else "text"
    return Input(name, form, streams.size(name))


def _folder(folder: Path) -> list[Input]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [Input(str(folder), "saved", sum(file.stat().st_size for file in folder.rglob("*.arrow")))]
    endings = (*_TEXT_ENDINGS, *tables.ENDINGS)
    files = sorted(file for file in folder.rglob("*") if streams.plain_name(file.name).endswith(endings))
    if not files:
        raise DataError(f"--input {folder} is a folder without any of {', '.join(f'*{ending}' for ending in endings)}")
    return [_file(str(file)) for file in files]


def read_chunks(
    source: Input, number: int, *, text_unit: Literal["line", "file"], start: Place | None = None
) -> Iterator[Chunk]:
    """Cut an input into chunks at the ends of records, from a place on.

    Files named .txt hold one document per line, or are one document with `text_unit="file"`; tables become one JSON
    object per row; all others hold one JSON object per line, or are one JSON array. Compression is recognised by the
    first bytes. Only a record longer than a chunk makes a chunk larger than `CHUNK_BYTES`.

    Raises:
        DataError: the input cannot be read, or is damaged.
    """
    start = start or Place(number=number)
    if source.form != "text":
        yield from _row_chunks(source, start)
        return
    kind: RecordKind = text_unit if source.is_lines_of_text else "json"
    line, consumed = start.line, 0
    try:
        with streams.open_input(source.name) as raw, streams.decompressed(raw, source.name) as stream:
            if kind == "json" and tables.is_array(stream):
                yield from _row_chunks(source, start)
                return
            stream.seek(start.offset)
            offset = start.offset
            while data := _read_piece(stream, whole=kind == "file"):
                offset += len(data)
                first, line = line + 1, line + data.count(b"\n")
                position = raw.tell()
                yield Chunk(
                    source=source.name,
                    first_line=first,
                    kind=kind,
                    data=data,
                    consumed=position - consumed,
                    end=Place(number=start.number, offset=offset, line=line),
                )
                consumed = position
    except streams.READ_ERRORS as error:
        raise DataError(f"{source.name} cannot be read to its end, near line {line + 1}: {error}") from error


def _row_chunks(source: Input, start: Place) -> Iterator[Chunk]:
    row = start.offset
    try:
        for data, rows, consumed in tables.read_rows(source.name, source.form, start.offset, CHUNK_BYTES):
            row += rows
            yield Chunk(
                source=source.name,
                first_line=row - rows + 1,
                kind="json",
                data=data,
                consumed=consumed,
                end=Place(number=start.number, offset=row, line=row),
            )
    except streams.READ_ERRORS as error:
        raise DataError(f"{source.name} cannot be read to its end, near row {row + 1}: {error}") from error


def _read_piece(stream: BinaryIO, *, whole: bool) -> bytes:
    """The next lines of a stream; nothing at its end."""
    data = stream.read(-1 if whole else CHUNK_BYTES)
    if not whole and data and not data.endswith(b"\n"):
        data += stream.readline()
    return data


def records(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Line number and bytes of every record. Lines with nothing but white space are no records."""
    if chunk.kind == "file":
        yield chunk.first_line, chunk.data.removeprefix(_BYTE_ORDER_MARK)
        return
    # Only line feeds end a line: other characters that splitlines() knows occur inside JSON strings.
    for offset, line in enumerate(chunk.data.split(b"\n")):
        number = chunk.first_line + offset
        record = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if record.strip():
            yield number, record.removesuffix(b"\r")
