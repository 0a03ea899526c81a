"""What a record means: the documents that handlers make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

Record = Mapping[str, Any]


class RecordError(ValueError):
    """Why a record is bad: the kind of problem for counting, and what exactly is wrong."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(problem, detail)
        self.problem = problem
        self.detail = detail


class Segment(NamedTuple):
    """A piece of text that is encoded on its own.

    Attributes:
        text: may be empty behind a marker.
        trained: whether the model learns to write it.
        marker: id of a token in front of it, which is no text.
        marker_is_end: the label in the marker's place is the end-of-document token: the turn before ends there.
    """

    text: str
    trained: bool = True
    marker: int | None = None
    marker_is_end: bool = False


Document = list[Segment]


class Handler(Protocol):
    """Turns records into documents.

    Attributes:
        columns: names of the datasets that plain documents go to; None for instruction data, whose prompts are masked.
        always_ends: an EOD belongs to every document, also without --append-eod.
        needs_packed: the label of a marker differs from the marker, which the compact form cannot hold.
    """

    @property
    def columns(self) -> tuple[str, ...] | None:
        """See above."""

    @property
    def always_ends(self) -> bool:
        """See above."""

    @property
    def needs_packed(self) -> bool:
        """See above."""

    def __call__(self, record: Record) -> list[list[Document]]:
        """The documents of each column; raises `RecordError`."""
        ...


def text_of(record: Record, key: str, *, optional: bool = False) -> str:
    """The text of a field; an empty one where it is optional and missing or null.

    Raises:
        RecordError: it is missing, no text, or empty.
    """
    value = record.get(key)
    if optional and (value is None or value == ""):
        return ""
    if key not in record:
        raise RecordError("missing key", f"no {key!r}; it has {', '.join(map(repr, list(record)[:10])) or 'nothing'}")
    if not isinstance(value, str):
        raise RecordError("not text", f"{key!r} is a {type(value).__name__}, not a string")
    if not value:
        raise RecordError("empty", f"the text of {key!r} is empty")
    return value
