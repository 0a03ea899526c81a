"""A map over worker processes that keeps the order, bounds the memory, and ends when a worker does."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

# Results that wait for an earlier one, per worker. They are what memory is bounded by.
_AHEAD = 4
_SECONDS_TO_END = 5.0


class WorkerError(RuntimeError):
    """A worker process failed or ended before its work was done."""


def ordered_map(
    make: Callable[[], Callable[[Job], Result]], jobs: Iterable[Job], *, workers: int
) -> Generator[Result, None, None]:
    """Results of `make()(job)` in the order of the jobs.

    With one worker everything runs in this process. Otherwise each worker process calls `make` once, so `make` must be
    picklable; it gets one job at a time, so neither side can block on a full pipe.

    Raises:
        WorkerError: a worker raised an exception, or was killed.
    """
    if workers == 1:
        yield from map(make(), jobs)
        return
    pool: _Pool[Job, Result] = _Pool(make, workers)
    try:
        yield from pool.run(iter(jobs))
    except BaseException:
        pool.kill()
        raise
    finally:
        pool.close()


class _Pool(Generic[Job, Result]):
    """Worker processes, each behind a pipe."""

    def __init__(self, make: Callable[[], Callable[[Job], Result]], workers: int) -> None:
        # Workers are spawned: a fork would copy the locks of the threads that libraries have started.
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, BaseProcess] = {}
        # Ctrl-C reaches every process of the terminal. Children inherit the mask: this one alone reacts, and ends them.
        # The tracker would start with the first child otherwise, and lift the mask.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, make), daemon=True)
                process.start()
                theirs.close()
                self._processes[ours] = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self, jobs: Iterator[Job]) -> Iterator[Result]:
        idle = deque(self._processes)
        busy: dict[Connection, int] = {}
        done: dict[int, Result] = {}
        given = taken = 0
        more = True
        while True:
            while more and idle and given - taken < _AHEAD * len(self._processes):
                try:
                    job = next(jobs)
                except StopIteration:
                    more = False
                    break
                connection = idle.popleft()
                self._send(connection, job)
                busy[connection] = given
                given += 1
            if not busy:
                return
            for connection in _readable(busy):
                done[busy.pop(connection)] = self._receive(connection)
                idle.append(connection)
            while taken in done:
                yield done.pop(taken)
                taken += 1

    def _send(self, connection: Connection, job: Job) -> None:
        try:
            connection.send(job)
        except OSError:
            self._receive(connection)  # Raises with what the worker said, or how it ended.
            raise

    def _receive(self, connection: Connection) -> Result:
        try:
            succeeded, value = connection.recv()
        except (EOFError, OSError):
            process = self._processes[connection]
            process.join(_SECONDS_TO_END)
            raise WorkerError(f"worker process {process.pid} {_ending(process.exitcode)}") from None
        if not succeeded:
            raise WorkerError(f"a worker process failed:\n{value}")
        result: Result = value
        return result

    def kill(self) -> None:
        """End the workers now, whatever they are doing."""
        for process in self._processes.values():
            process.kill()

    def close(self) -> None:
        """Close the pipes, upon which idle workers end, and wait for them."""
        for connection, process in self._processes.items():
            connection.close()
            process.join(_SECONDS_TO_END)


def _readable(connections: Iterable[Connection]) -> list[Connection]:
    """Wait until some of the connections have something to say, or have been closed by the end of their process."""
    ready: Any = wait(list(connections))
    found: list[Connection] = ready
    return found


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory: try fewer --workers" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"ended by itself with exit code {code}"


def _serve(connection: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """The life of a worker: build once, then answer jobs until the pipe is closed."""
    try:
        work = make()
        while True:
            connection.send((True, work(connection.recv())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:
        connection.send((False, traceback.format_exc()))
