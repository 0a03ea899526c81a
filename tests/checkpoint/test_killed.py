"""A process that is killed while it saves leaves a checkpoint that can be loaded: the one before or the new one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint import latest, list_checkpoints, load, save
from tests.checkpoint.helpers import assert_holds, silent, small_state
from tests.support import run_ranks

_CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
# 16 MB, so that a save takes long enough to be hit in the middle of a file.
_LARGE = 1 << 22


def kill_before_change(root: str, number: int) -> list[str]:
    """Kill this process just before the change with this number to a file of the folder; return the changes seen."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES and str(arguments[0]).startswith(root):
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)
    return seen


def in_child(action: Callable[[], None], *, kill_after: float | None = None) -> bool:
    """Run in a forked process; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def _every_point(folder: str, iteration: int) -> int:
    """Kill a save of value 2 over a checkpoint of value 1 before each of its changes to files; return their number."""
    number = 0
    while True:
        root = Path(folder) / f"{number}"
        save(root, 1, small_state(1.0), log=silent)

        def action(root: Path = root, number: int = number) -> None:
            kill_before_change(str(root), number)
            save(root, iteration, small_state(2.0), keep_last=1, log=silent)

        finished = in_child(action)
        loaded = assert_holds(root, {2.0} if finished else {1.0, 2.0})
        assert loaded.iteration == latest(root)
        if number % 5 == 0:
            # The next save works and leaves nothing but itself.
            save(root, 3, small_state(3.0), keep_last=1, log=silent)
            assert_holds(root, {3.0})
            assert {p.name for p in root.iterdir()} == {"iter_0000003", "latest_checkpointed_iteration.txt"}
        shutil.rmtree(root)
        if finished:
            return number
        number += 1


def test_killed_before_every_change_to_a_file(tmp_path: Path) -> None:
    [changes] = run_ranks(1, _every_point, str(tmp_path), 2, init=False)
    assert changes > 15


def test_killed_while_replacing_a_checkpoint_of_the_same_iteration(tmp_path: Path) -> None:
    [changes] = run_ranks(1, _every_point, str(tmp_path), 1, init=False)
    assert changes > 15


def _first_save(folder: str) -> None:
    """Kill the very first save of a run: there is nothing, or the whole checkpoint."""
    outcomes = set()
    for number in range(1000):
        root = Path(folder) / f"{number}"

        def action(root: Path = root, number: int = number) -> None:
            kill_before_change(str(root), number)
            save(root, 1, small_state(1.0), log=silent)

        finished = in_child(action)
        found = latest(root)
        outcomes.add(found)
        if found is None:
            assert load(root, into=dict(small_state().tensors), log=silent) is None
        else:
            assert_holds(root, {1.0})
        if finished:
            break
    assert outcomes == {None, 1}


def test_killed_in_the_first_save(tmp_path: Path) -> None:
    run_ranks(1, _first_save, str(tmp_path), init=False)


def _random_moments(folder: str, seed: int, kills: int) -> None:
    root = Path(folder)
    moments = random.Random(seed)
    started = time.monotonic()
    save(root, 1, small_state(1.0, elements=_LARGE), log=silent)
    duration = time.monotonic() - started
    for _ in range(kills):
        before = assert_holds(root, {float(i) for i in list_checkpoints(root)}, elements=_LARGE)

        def action(first: int = before.iteration + 1) -> None:
            for iteration in range(first, first + 100):
                state = small_state(float(iteration), elements=_LARGE)
                save(root, iteration, state, keep_last=2, log=silent)

        assert not in_child(action, kill_after=moments.uniform(0.0, 3 * duration))
        after = assert_holds(root, {float(i) for i in list_checkpoints(root)}, elements=_LARGE)
        assert after.iteration >= before.iteration


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    run_ranks(1, _random_moments, str(tmp_path), 1, 12, init=False)
