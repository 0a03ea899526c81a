"""Runs a function on several processes that talk over gloo, for tests."""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_SECONDS_TO_EXIT = 10.0


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module, for tests that run it in their own process."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "tools" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_PRELOAD = (
    *("torch.distributed.tensor", "torch.distributed.fsdp", "torch.profiler"),
    *("torch._inductor.compile_fx", "setuptools", "pydantic"),  # `deepspeed.initialize` imports them: 1 s per rank
    *("megatron.training.run", "tests.parity", "pytest"),
)
"""What nearly every rank imports. Not DeepSpeed itself: importing it settles what its accelerator is."""


def worker_context() -> multiprocessing.context.ForkServerContext:
    """Workers are forked from a server that has imported the trainer once: one then starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    return context


def rank_process(main: Callable[[], None], rank: int, world_size: int, port: int, output: str) -> None:
    """One rank as a launcher would start it: `run_to_exit` around `main`, what it prints in a file."""
    from megatron.training.failures import run_to_exit

    _print_to(output, output)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    run_to_exit(main)


def _print_to(output: str, errors: str) -> None:
    """Let this process print into files; both may be the same one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, flags), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")


def run_script(*words: object, timeout: float = 240.0, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `python WORDS...` does in the root of the repository, in a process that has imported torch already.

    Args:
        words: path of the script, and its arguments.
        timeout: seconds until the process is given up.
        variables: further ones of its environment.

    Raises:
        AssertionError: it did not end in time.
    """
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("output", "errors")]
        environ = {**os.environ, **variables}
        process = worker_context().Process(target=_script, args=(command, environ, *map(str, files)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"{command} did not end in time")
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def _script(command: list[str], environ: dict[str, str], output: str, errors: str) -> None:
    _print_to(output, errors)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    sys.argv = command
    sys.path.insert(0, str(ROOT / Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def _worker(
    rank: int,
    world_size: int,
    port: int,
    env: dict[str, str],
    init: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    answer: multiprocessing.connection.Connection,
) -> None:
    faulthandler.enable()
    os.environ.pop("DS_ACCELERATOR", None)  # a test before this one may have chosen another device
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        **env,
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if init:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        result = function(*args)
        if dist.is_initialized():
            dist.barrier()
        answer.send((True, result))
    except BaseException:
        answer.send((False, traceback.format_exc()))
    # Destructors of process groups may abort the interpreter after all work is done; leave without running them.
    sys.stdout.flush()
    sys.stderr.flush()
    answer.close()
    os._exit(0)


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 180.0,
    env: dict[str, str] | None = None,
    init: bool = True,
) -> list[Any]:
    """Call `function(*args)` on `world_size` processes and return their results in rank order.

    `function` must be importable (a module-level function). With `init`, the default process group (gloo) exists
    when it is called; the usual variables (RANK, WORLD_SIZE, ...) are always set.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or the ranks that did not answer in time.
    """
    context = worker_context()
    port = free_port()
    processes: list[BaseProcess] = []
    answers: list[multiprocessing.connection.Connection] = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_worker, args=(rank, world_size, port, env or {}, init, function, args, sender), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        answers.append(receiver)
    try:
        return _collect(answers, processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.join(_SECONDS_TO_EXIT if process.exitcode is None and not sys.exc_info()[0] else 0)
            if process.is_alive():
                process.kill()


def _collect(
    answers: list[multiprocessing.connection.Connection], processes: list[BaseProcess], deadline: float
) -> list[Any]:
    """The results of all ranks; the first failure to arrive is raised, whatever its rank."""
    results: dict[int, Any] = {}
    while len(results) < len(answers):
        waiting = [answers[rank] for rank in range(len(answers)) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(answers))) - set(results))
            raise AssertionError(f"ranks {missing} did not answer in time")
        for connection in ready:
            rank = answers.index(connection)  # type: ignore[arg-type]
            try:
                succeeded, value = answers[rank].recv()
            except EOFError:
                processes[rank].join(_SECONDS_TO_EXIT)
                raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not succeeded:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(answers))]
