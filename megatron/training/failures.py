"""How a program of many ranks ends: with one exit code, one clear message, and without waiting for the dead.

Rules for every entry point:
- A mistake of the user (one of this package's own `ValueError`s) is explained without a traceback.
- Any other exception is a defect or a broken machine: traceback, with the rank.
- A rank that fails leaves without a barrier or a clean-up that needs the others. That closes its connections, so ranks
  on gloo fail within moments too; ranks on other backends are ended by the launcher, which sees the exit code.
- A rank that only echoes a failure gives the launcher time to notice the cause and to end it, before it says a word.
- A rank that succeeds waits for the others, then leaves. It does not run the interpreter's own clean-up: destructors of
  process groups may abort there after all work is done, and the exit code would call a finished training a failure.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch.distributed as dist

_PACKAGE = __name__.partition(".")[0]
# Launchers poll their processes; torchrun every 0.1 s, and then it names the lowest failed rank as the root cause.
_SECONDS_FOR_THE_CAUSE = 2.0
# What gloo and the rendezvous store say when the other end has gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "failed to recv, got 0 bytes")
_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def is_user_error(error: BaseException) -> bool:
    """Whether the message says all that a user needs: it is a `ValueError` of a kind that this package defines."""
    return isinstance(error, ValueError) and type(error).__module__.partition(".")[0] == _PACKAGE


def lost_a_peer(error: BaseException) -> bool:
    """Whether the error only says that another rank has gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER)


def describe_failure(error: BaseException, rank: int, world_size: int) -> str:
    """The text that a failing rank prints."""
    where = f"[rank {rank}] " if world_size > 1 else ""
    if is_user_error(error):
        return f"{where}error: {error}"
    if lost_a_peer(error):
        return f"{where}error: another rank has gone; its own message or the launcher says why\n  {error}"
    trace = "".join(traceback.format_exception(error)).rstrip()
    return "\n".join(where + line for line in trace.splitlines())


def run_to_exit(main: Callable[[], None], env: Mapping[str, str] = os.environ) -> NoReturn:
    """Call `main`, then end this process with exit code 0 if it returned and another one if it raised.

    Open files, writers and model must be closed by `main`: nothing runs after it.

    Args:
        main: the program.
        env: tells the rank (`RANK`, `WORLD_SIZE`), also before a process group exists.
    """
    faulthandler.enable()
    try:
        code = _call(main)
        if code == 0 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BaseException as error:
        _report(error, rank=int(env.get("RANK", "0")), world_size=int(env.get("WORLD_SIZE", "1")))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _call(main: Callable[[], None]) -> int:
    """The exit code of a program that returns or calls `sys.exit`."""
    try:
        main()
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        sys.stderr.write(f"{leaving.code}\n")
        return 1
    return 0


def _report(error: BaseException, rank: int, world_size: int) -> None:
    """Print the failure; where a launcher ends the other ranks, only the one that says why gets to speak."""
    said_by_rank_0 = rank > 0 and is_user_error(error)
    if said_by_rank_0 or lost_a_peer(error):
        time.sleep(_SECONDS_FOR_THE_CAUSE)
    sys.stdout.flush()
    sys.stderr.write(describe_failure(error, rank, world_size) + "\n")
