"""A launcher that starts nothing again is started again itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

AGAIN = (sys.executable, "-m", "megatron.launch.again")
SECONDS = 120.0


def _lives(folder: Path) -> int:
    return len(list(folder.iterdir()))


def _run(folder: Path, times: int, script: str) -> tuple[int, str]:
    done = subprocess.run(
        [*AGAIN, str(times), "sh", "-c", f"touch {folder}/$$; {script}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    return done.returncode, done.stderr


def test_a_command_is_started_again_while_it_fails(tmp_path: Path) -> None:
    code, said = _run(tmp_path, 5, f"[ $(ls {tmp_path} | wc -l) -gt 2 ] || exit 7")
    assert (code, _lives(tmp_path)) == (0, 3)
    assert said.splitlines() == [f"exit code 7: starting again ({n} of --max-restarts 5)" for n in (1, 2)]


def test_not_more_often_than_asked(tmp_path: Path) -> None:
    assert _run(tmp_path, 1, "kill -9 $$")[0] == 128 + 9
    assert _lives(tmp_path) == 2


def test_what_was_told_to_end_is_not_started_again(tmp_path: Path) -> None:
    # The first life waits to be told.
    with subprocess.Popen([*AGAIN, "5", "sh", "-c", f"touch {tmp_path}/$$; exec sleep {SECONDS}"]) as process:
        deadline = time.monotonic() + SECONDS
        while not _lives(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(SECONDS) == 128 + 15
    assert _lives(tmp_path) == 1
