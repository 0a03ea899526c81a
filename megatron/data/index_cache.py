"""A folder of built index arrays, shared by all processes that need them.

An entry is named by a hash of everything it depends on, holds identical bytes whoever builds it, and is published by
renames with its description last. Sharing is therefore always right; the lock only avoids doing the work twice. It
needs nothing but a file system, so it serves one process, many ranks, and nodes with and without a common disk alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError

Array = npt.NDArray[Any]
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """How long a process waits for the one that builds, in seconds."""

    poll: float = 0.2
    heartbeat: float = 2.0
    stale_after: float = 60.0
    """A builder without a heartbeat for this long is taken for dead and its work is taken over."""
    give_up_after: float = 7200.0
    report_every: float = 30.0


@dataclass(frozen=True, kw_only=True)
class IndexCache:
    """One cache folder.

    Attributes:
        folder: created when something is built.
        report: receives the lines that tell what is built or waited for.
    """

    folder: Path
    report: Callable[[str], None]
    waiting: Waiting = Waiting()

    def load_or_build(
        self, kind: str, key: Mapping[str, object], build: Callable[[], Mapping[str, Array]]
    ) -> dict[str, Path]:
        """Paths of the arrays of one entry, built by this process if no other has done or does it.

        Args:
            kind: readable part of the file names.
            key: all that the arrays depend on; JSON values.
            build: makes the arrays; its names become part of the file names.

        Raises:
            DataError: the folder cannot be written, or the builder is alive but not done within the waiting time.
        """
        entry = _Entry(self.folder, kind, key)
        began = reported = time.monotonic()
        while True:
            paths = entry.find(self.report)
            if paths is not None:
                return paths
            lock = _Lock(entry.base.with_name(entry.base.name + ".lock"), self.waiting)
            if self._acquire(lock):
                with lock.held():
                    # Another process may have finished between the look and the lock.
                    return entry.find(self.report) or self._build(entry, build)
            now = time.monotonic()
            if now - began > self.waiting.give_up_after:
                raise DataError(
                    f"Waited {now - began:.0f} s for {lock.owner()} to build {entry.base.name} in {self.folder}. "
                    f"If that process is gone, remove {lock.path}."
                )
            if now - reported > self.waiting.report_every:
                reported = now
                self.report(f"waiting for {lock.owner()} to build {entry.base.name} ({now - began:.0f} s)")
            time.sleep(self.waiting.poll)
            if lock.seems_abandoned():
                self.report(f"{lock.owner()} stopped while building {entry.base.name}; taking over")
                lock.break_open()

    def _acquire(self, lock: _Lock) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return lock.acquire()
        except OSError as error:
            raise DataError(
                f"Cannot write the index cache {self.folder}: {error}. Choose a writable folder with --data-cache-path."
            ) from error

    def _build(self, entry: _Entry, build: Callable[[], Mapping[str, Array]]) -> dict[str, Path]:
        began = time.monotonic()
        self.report(f"building {entry.base.name} in {self.folder}")
        arrays = build()
        try:
            paths = entry.store(arrays)
        except OSError as error:
            raise DataError(
                f"Cannot write the index cache {self.folder}: {error}. Choose another folder with --data-cache-path."
            ) from error
        self.report(f"built {entry.base.name} in {time.monotonic() - began:.2f} s")
        return paths


def load_array(path: Path) -> Array:
    """Map a cached array read-only, as a plain array (indexing a numpy.memmap is slower)."""
    array: Array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    return array


class _Entry:
    """The files of one entry: `<base>-<array>.npy` and, last, `<base>.json`."""

    def __init__(self, folder: Path, kind: str, key: Mapping[str, object]) -> None:
        self.key = {"format": _FORMAT, "kind": kind, **key}
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:24]
        self.base = folder / f"{kind}-{digest}"
        self.description = self.base.with_name(self.base.name + ".json")

    def path(self, name: str) -> Path:
        return self.base.with_name(f"{self.base.name}-{name}.npy")

    def find(self, report: Callable[[str], None]) -> dict[str, Path] | None:
        """The paths if the entry is complete. A damaged entry counts as none and is built again."""
        try:
            recorded = json.loads(self.description.read_text())
        except OSError:
            # Not there; if it cannot be read either, writing it will say why.
            return None
        except ValueError:
            report(f"{self.description} is damaged; building it again")
            return None
        for name, form in recorded["arrays"].items():
            try:
                array = load_array(self.path(name))
            except (OSError, ValueError) as error:
                report(f"{self.path(name)} is damaged ({error}); building it again")
                return None
            if [str(array.dtype), list(array.shape)] != form:
                report(f"{self.path(name)} is not what its description says; building it again")
                return None
        return {name: self.path(name) for name in recorded["arrays"]}

    def store(self, arrays: Mapping[str, Array]) -> dict[str, Path]:
        form = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
        for name, array in arrays.items():
            with _publish(self.path(name)) as file:
                np.save(file, array, allow_pickle=False)
        with _publish(self.description) as file:
            file.write(json.dumps({"key": self.key, "arrays": form}, indent=1).encode())
        return {name: self.path(name) for name in arrays}


@contextlib.contextmanager
def _publish(path: Path) -> Iterator[Any]:
    """A file that gets its name when it is complete and on disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Lock:
    """A file that exists while somebody builds. Its owner touches it; who sees no touch for long may remove it."""

    def __init__(self, path: Path, waiting: Waiting) -> None:
        self.path = path
        self._waiting = waiting
        self._me = {"machine": _machine(), "process": os.getpid(), "token": uuid.uuid4().hex}

    def acquire(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self._me, file)
        return True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._beat, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if self._content() == self._me:
                self.path.unlink(missing_ok=True)

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(self._waiting.heartbeat):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def owner(self) -> str:
        owner = self._content() or {}
        return f"process {owner.get('process', '?')} on {str(owner.get('machine', '?')).split('/')[0]}"

    def seems_abandoned(self) -> bool:
        """Whether the owner is a dead process of this machine, or was silent for as long as the settings allow."""
        owner = self._content()
        if owner is None:
            return self._silent()
        if owner.get("machine") == _machine() and not _runs(int(owner["process"])):
            return True
        return self._silent()

    def _silent(self) -> bool:
        # The time stamp is only compared with itself: clocks of two machines may differ.
        seen = self._stamp()
        if seen is None:
            return False
        deadline = time.monotonic() + self._waiting.stale_after
        while time.monotonic() < deadline:
            time.sleep(self._waiting.poll)
            if self._stamp() != seen:
                return False
        return True

    def break_open(self) -> None:
        """Take the lock away from a dead owner; when several try, one succeeds and the others find it gone."""
        grave = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:8]}.dead")
        with contextlib.suppress(OSError):
            self.path.rename(grave)
            grave.unlink()

    def _stamp(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return None

    def _content(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError):
            return None


def _machine() -> str:
    """Where a process number means the same process: host and process namespace (containers have their own)."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{namespace.readlink() if namespace.exists() else ''}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
