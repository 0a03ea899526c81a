"""What lets preprocessing go on after a kill: a small file that says how far the unfinished datasets are good."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.data.errors import DataError
from megatron.data.indexed_writer import sync, sync_folder
from megatron.data.preprocess.inputs import Place
from megatron.data.unfinished import Mark

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A state to go on from.

    Attributes:
        place: where reading goes on; None when everything is encoded and only names are left to be given.
        marks: how far each dataset goes, by name.
        counts: of the summary, as JSON values.
    """

    place: Place | None
    marks: Mapping[str, Mark]
    counts: Mapping[str, Any]


class Journal:
    """The file `{output_prefix}.preprocess.json`, and a lock so that one process at a time writes the datasets.

    Args:
        output_prefix: of the datasets.
        settings: all that the datasets depend on; JSON values.
    """

    def __init__(self, output_prefix: str, settings: Mapping[str, Any]) -> None:
        self._path = Path(f"{output_prefix}.preprocess.json")
        self._lock = Path(f"{output_prefix}.preprocess.lock")
        self._settings = json.loads(json.dumps({"format": _FORMAT, **settings}))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out.

        Raises:
            DataError: another one is at work. The system frees the lock of a process that was killed.
        """
        with self._lock.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(f"another process is writing {self._path.name.split('.preprocess')[0]} now") from None
            try:
                yield
            finally:
                self._lock.unlink(missing_ok=True)

    def read(self) -> tuple[Entry | None, str]:
        """The last entry and a sentence about it; no entry where there is none of the same settings and inputs."""
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None, ""
        except ValueError:
            return None, f"{self._path} is damaged; starting from the beginning"
        if content.get("settings") != self._settings:
            old, new = content.get("settings", {}), self._settings
            changed = [name for name in new if old.get(name) != new[name]] or ["other settings"]
            return None, f"an unfinished run is not continued, since it had other {', '.join(changed)}"
        place = content["place"]
        entry = Entry(
            place=None if place is None else Place(**place),
            marks={name: Mark(**mark) for name, mark in content["marks"].items()},
            counts=content["counts"],
        )
        return entry, f"continuing an unfinished run after {entry.counts['documents']} documents"

    def write(self, entry: Entry) -> None:
        """Replace the entry."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        content = {
            "settings": self._settings,
            "place": None if entry.place is None else asdict(entry.place),
            "marks": {name: asdict(mark) for name, mark in entry.marks.items()},
            "counts": dict(entry.counts),
        }
        with temporary.open("w") as file:
            json.dump(content, file)
            sync(file)
        temporary.replace(self._path)
        sync_folder(self._path.parent)

    def remove(self) -> None:
        """The datasets are complete, or thrown away."""
        self._path.unlink(missing_ok=True)
        self._path.with_name(self._path.name + ".tmp").unlink(missing_ok=True)

    def exists(self) -> bool:
        """Whether there is an entry to go on from."""
        return self._path.exists()
