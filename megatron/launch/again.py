"""Runs a command again when it has failed: `python -m megatron.launch.again TIMES COMMAND ...`.

torchrun starts processes again by itself. DeepSpeed's launcher ends them all when one has failed, and then itself.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence


def run(command: Sequence[str], times: int) -> int:
    """The exit code, as a shell gives it, of a command that is started again while it fails, at most `times` times.

    SIGTERM is handed on to the command, which is then not started again; neither is one that was interrupted.
    """
    stopped = threading.Event()
    lives: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: object) -> None:
        stopped.set()
        if number == signal.SIGTERM and lives:  # a terminal sends SIGINT to both
            lives[-1].terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while True:
        with subprocess.Popen(command) as life:
            lives.append(life)
            if stopped.is_set():
                life.terminate()
            code = life.wait()
        if code == 0 or stopped.is_set() or len(lives) > times:
            return code if code >= 0 else 128 - code
        again = f"starting again ({len(lives)} of --max-restarts {times})"
        print(f"exit code {code}: {again}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:], int(sys.argv[1])))
