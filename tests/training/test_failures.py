"""How processes end: exit codes, messages, and that nobody waits for a dead rank."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.training.failures import describe_failure, is_user_error, lost_a_peer
from megatron.training.lr import ScheduleError
from tests.support import free_port, rank_process, worker_context

SECONDS_TO_NOTICE = 30.0  # far below a minute; measured: 2 to 3 seconds, 2 of them deliberate


def run(main: Callable[[], None], world_size: int, folder: Path) -> tuple[list[int | None], list[str]]:
    """Exit codes and outputs of `world_size` processes."""
    context = worker_context()
    port = free_port()
    outputs = [folder / f"{rank}.log" for rank in range(world_size)]
    processes = [
        context.Process(target=rank_process, args=(main, rank, world_size, port, str(outputs[rank])))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS_TO_NOTICE
    while not all(process.exitcode is not None or _is_stopped(process.pid) for process in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes], [output.read_text() for output in outputs]


def _is_stopped(pid: int | None) -> bool:
    """Whether a process got SIGSTOP; only somebody else can end it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _returns() -> None:
    print("done", end="")  # not flushed


def _user_error() -> None:
    raise ScheduleError("--lr is -1; it must be positive")


def _defect() -> None:
    raise ValueError("not ours")


def _leaves() -> None:
    sys.exit(3)


def _leaves_with_words() -> None:
    sys.exit("bye")


def _interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "code", "output"),
    [
        (_returns, 0, "done"),
        (_user_error, 1, "error: --lr is -1; it must be positive\n"),
        (_leaves, 3, ""),
        (_leaves_with_words, 1, "bye\n"),
        (_interrupted, 130, ""),
    ],
)
def test_one_process(main: Callable[[], None], code: int, output: str, tmp_path: Path) -> None:
    assert run(main, 1, tmp_path) == ([code], [output])


def test_a_defect_has_a_traceback(tmp_path: Path) -> None:
    codes, (output,) = run(_defect, 1, tmp_path)
    assert codes == [1]
    assert "Traceback" in output and "in _defect" in output and output.endswith("ValueError: not ours\n")


def _work_until(trouble: Callable[[], None]) -> None:
    dist.init_process_group("gloo")
    for step in range(1_000_000):
        dist.all_reduce(torch.ones(1))
        if step == 20 and dist.get_rank() == 1:
            trouble()


def _killed() -> None:
    _work_until(lambda: os.kill(os.getpid(), signal.SIGKILL))


def _fails() -> None:
    _work_until(_defect)


def _stays_healthy() -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    codes, outputs = run(_killed, 2, tmp_path)
    assert codes == [1, -signal.SIGKILL]
    assert outputs[0].startswith("[rank 0] error: another rank has gone; its own message or the launcher says why")
    assert "Traceback" not in outputs[0]


@pytest.mark.slow
def test_a_failing_rank_ends_the_others_and_says_why(tmp_path: Path) -> None:
    codes, outputs = run(_fails, 2, tmp_path)
    assert codes == [1, 1]
    assert all(line.startswith("[rank 1] ") for line in outputs[1].splitlines())
    assert outputs[1].endswith("[rank 1] ValueError: not ours\n")
    assert "[rank 0] error: another rank has gone" in outputs[0]


def test_ranks_that_succeed_leave_together(tmp_path: Path) -> None:
    assert run(_stays_healthy, 2, tmp_path) == ([0, 0], ["", ""])


def test_which_errors_are_the_users() -> None:
    assert is_user_error(ScheduleError("x"))
    assert not is_user_error(ValueError("x"))
    assert not is_user_error(UnicodeDecodeError("utf-8", b"", 0, 1, "x"))
    assert not is_user_error(RuntimeError("x"))
    assert not lost_a_peer(RuntimeError("out of memory"))


def test_one_process_has_no_rank_in_its_message() -> None:
    assert describe_failure(ScheduleError("bad"), 0, 1) == "error: bad"
    assert describe_failure(ScheduleError("bad"), 3, 8) == "[rank 3] error: bad"
