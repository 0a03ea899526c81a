"""Compiles the simulated device on demand. `python -m tests.sim.build npu` does it by hand."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import torch

Device = Literal["hpu", "npu", "neuron"]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "backend"
_KEY_FLAGS = {"hpu": ("-DSIM_HPU",), "privateuse1": ()}
_FLAGS = ("-O1", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wno-unused-parameter")


class CannotBuildError(RuntimeError):
    """There is no C++ compiler here, or it failed."""


def dispatch_key(device: Device) -> str:
    """The library a device needs: `hpu` has a dispatch key of its own, the others share PrivateUse1."""
    return "hpu" if device == "hpu" else "privateuse1"


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def library(device: Device) -> Path:
    """Path of the compiled library, which need not exist yet.

    The name holds a hash of everything it was made from, so a cached library is never stale.
    """
    parts = [torch.__version__, sysconfig.get_config_var("SOABI"), *_FLAGS, *_KEY_FLAGS[dispatch_key(device)]]
    parts += [path.read_text() for path in sorted(SOURCES.iterdir())]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "megatron-deepspeed" / "sim" / digest / f"sim_{dispatch_key(device)}.so"


def ensure(device: Device) -> Path:
    """The library, compiled if it is not there; processes that ask at the same time wait for the first.

    Raises:
        CannotBuildError: without a compiler, or with its messages.
    """
    path = library(device)
    if path.exists():
        return path
    if compiler() is None:
        raise CannotBuildError(f"simulated devices need a C++ compiler: {os.environ.get('CXX', 'g++')} was not found")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(device, path)
    return path


def _compile(device: Device, path: Path) -> None:
    """In a process of its own, as `load` also imports what it has compiled."""
    command = [sys.executable, "-m", "tests.sim.build", device, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not path.exists():
        raise CannotBuildError(f"the simulated {device} did not compile:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def main(device: Device, path: Path) -> None:
    """Compile with torch's own extension builder, then move the library into place at once."""
    from torch.utils import cpp_extension

    name, scratch = path.stem, path.parent / f"{path.stem}.build"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    cpp_extension.load(
        name=name,
        sources=[str(source) for source in sorted(SOURCES.glob("*.cpp"))],
        extra_cflags=[*_FLAGS, *_KEY_FLAGS[dispatch_key(device)]],
        build_directory=str(scratch),
        verbose=True,
    )
    (scratch / f"{name}.so").replace(path)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    wanted = sys.argv[1]
    main(wanted, Path(sys.argv[2]) if len(sys.argv) > 2 else library(wanted))  # type: ignore[arg-type]
