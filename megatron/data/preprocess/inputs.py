"""From what `--input` says to pieces of text files: which files, and how they are cut."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from megatron.data.errors import DataError

RecordKind = Literal["json", "line", "file"]

# Large enough that handing a chunk to a process costs nothing beside encoding it (about half a second), small enough
# that the last chunks keep all workers busy and memory stays in the tens of megabytes.
CHUNK_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive records of one file, as bytes.

    Attributes:
        source: path of the file.
        first_line: number of the first line in `data`, counted from 1.
        kind: what a record is: a JSON object on a line, a line of text, or all of `data`.
        data: whole lines, with their line ends.
        consumed: bytes of the file on disk that were read for this chunk (compressed bytes for .gz).
    """

    source: str
    first_line: int
    kind: RecordKind
    data: bytes
    consumed: int


def find_inputs(patterns: Iterable[str]) -> list[Path]:
    """The files that paths and glob patterns name, in order; the matches of one pattern are sorted.

    Raises:
        DataError: a pattern matches nothing, or names something that is not a file.
    """
    files: list[Path] = []
    for pattern in patterns:
        # Path.glob takes no absolute patterns, which is what people give.
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        if not found:
            raise DataError(f"--input {pattern}: no such file, and no file matches it as a pattern")
        for path in map(Path, found):
            if not path.is_file():
                raise DataError(f"--input {path} is not a file; for a folder give a pattern such as '{path}/*'")
            files.append(path)
    return files


def read_chunks(file: Path, *, text_unit: Literal["line", "file"]) -> Iterator[Chunk]:
    """Cut a file, plain or gzip, into chunks at line ends.

    Files named .txt or .txt.gz hold one document per line, or are one document with `text_unit="file"`; all others
    hold one JSON object per line. Only a line longer than a chunk makes a chunk larger than `CHUNK_BYTES`.

    Raises:
        DataError: the file cannot be read, or is a damaged .gz.
    """
    kind = _kind(file, text_unit)
    line, consumed = 1, 0
    try:
        with file.open("rb") as raw, _decompressed(raw) as stream:
            while data := _read_piece(stream, whole=kind == "file"):
                if line == 1 and kind == "json" and data.lstrip()[:1] == b"[":
                    raise DataError(
                        f"{file} is one JSON array; write one object per line instead (jq -c '.[]' {file} > {file}l)"
                    )
                position = raw.tell()
                yield Chunk(source=str(file), first_line=line, kind=kind, data=data, consumed=position - consumed)
                line, consumed = line + data.count(b"\n"), position
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read to its end, near line {line}: {error}") from error


def _kind(file: Path, text_unit: Literal["line", "file"]) -> RecordKind:
    name = file.name.lower().removesuffix(".gz")
    return text_unit if name.endswith(".txt") else "json"


def _decompressed(raw: BinaryIO) -> BinaryIO:
    magic = raw.read(len(_GZIP_MAGIC))
    raw.seek(0)
    return cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if magic == _GZIP_MAGIC else raw


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
