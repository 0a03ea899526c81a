"""`python -m megatron.launch --check`: tries on every node what a run will need, and says what is not there.

The launcher starts this program in place of the trainer, with as many processes. They meet over gloo, which needs no
device, and tell the first one what they found.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from megatron import accelerators
from megatron.accelerators import Accelerator
from megatron.launch.findings import Finding, causes, table

_PACKAGES = ("torch", "numpy", "deepspeed")
_OF_VENDOR: Mapping[str, tuple[str, ...]] = {
    "hpu": ("habana-torch-plugin",),
    "npu": ("torch-npu",),
    "neuron": ("torch-neuronx",),
    "neuron_xla": ("torch-xla", "torch-neuronx"),
}
_ROOT = Path(__file__).resolve().parents[1]


class PreflightError(ValueError):
    """The processes cannot even meet."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Place:
        """What the launcher has said; DeepSpeed's calls the number of processes on a node otherwise than torchrun."""
        size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE", "1")
        return cls(
            rank=int(env.get("RANK", "0")),
            world_size=int(env.get("WORLD_SIZE", "1")),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_size=int(size),
        )

    @property
    def node(self) -> int:
        """Number of this machine."""
        return self.rank // self.local_size


def parser() -> argparse.ArgumentParser:
    """What the launcher passes on."""
    result = argparse.ArgumentParser(description="Started by python -m megatron.launch --check.")
    result.add_argument("--device", default="auto")
    result.add_argument("--folder", action="append", default=[], type=Path, help="that all nodes write to")
    result.add_argument("--timeout", type=int, default=60, help="seconds to wait for others")
    return result


def main() -> None:
    """Find out, tell the first process, end with 1 if anything is wrong anywhere."""
    asked, place = parser().parse_args(), Place.of(os.environ)
    patience = timedelta(seconds=asked.timeout)
    _meet(place, patience)
    accelerator, device, device_problem = _device(asked.device, place)
    finding = Finding(
        node=place.node,
        rank=place.rank,
        host=platform.node(),
        versions=versions(asked.device if accelerator is None else accelerator.name),
        device=device_problem or (accelerator.device_description() if accelerator else ""),
        problems={
            "device": device_problem,
            "folder": _shared(asked.folder, place),
            "collective": _collective(accelerator, device, patience),
        },
        clock=_clock_offset(),
    )
    findings: list[Finding] = [finding] * place.world_size
    dist.all_gather_object(findings, finding)
    wrong = causes(findings)
    if place.rank == 0:
        print("\n".join([*table(findings), *wrong, "" if wrong else "all checks passed"]).rstrip(), flush=True)
    dist.barrier()  # a process that leaves with 1 has the launcher end the others
    if wrong:
        sys.exit(1)


def versions(device: str) -> dict[str, str]:
    """Versions of what a run on `device` depends on, and a fingerprint of this package's code."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_OF_VENDOR.get(device, ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return {**found, "code": digest.hexdigest()[:8]}


def _meet(place: Place, patience: timedelta) -> None:
    """Join the others. Raises PreflightError with those that are missing."""
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        return
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    meeting = f"{address}:{port}"
    # torchrun keeps the store of its own processes; other launchers leave it to the first process.
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        server = TCPStore(address, int(port), is_master=serves, timeout=patience, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise PreflightError(f"{platform.node()} cannot reach the first node at {meeting}: {error}") from None
    store = PrefixStore("preflight", server)
    keys = [str(rank) for rank in range(place.world_size)]
    store.set(keys[place.rank], platform.node())
    try:
        store.wait(keys, patience)
    except dist.DistStoreError:
        missing = sorted({rank // place.local_size for rank, key in enumerate(keys) if not store.check([key])})
        raise PreflightError(
            f"node(s) {', '.join(str(node) for node in missing)} did not come to {meeting} within "
            f"{patience.seconds} s; every node runs the same command with its own --node-rank"
        ) from None
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=patience)


def _device(name: str, place: Place) -> tuple[Accelerator | None, torch.device, str]:
    """The device of this process, and why it cannot be used; then the host stands in for it."""
    try:
        accelerator = accelerators.select(name)
        return accelerator, accelerator.set_device(place.local_rank), ""
    except (ValueError, RuntimeError) as error:
        return None, torch.device("cpu"), str(error)


def _shared(folders: Sequence[Path], place: Place) -> str:
    """Why a folder cannot be shared: not writable, or not the one that the first process sees."""
    problems = [problem for folder in folders if (problem := _shared_folder(folder, place))]
    return "; ".join(problems)


def _shared_folder(folder: Path, place: Place) -> str:
    sign, own = folder / ".preflight", folder / f".preflight-{place.rank}"
    token: list[str] = [f"{platform.node()} {os.getpid()}"]
    dist.broadcast_object_list(token, src=0)
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(token[0])
        if place.rank == 0:
            sign.write_text(token[0])
    except OSError as error:
        problem = f"{folder} is not writable ({error.strerror})"
    dist.barrier()
    if not problem and (not sign.is_file() or sign.read_text() != token[0]):
        problem = f"{folder} is not the folder of that name on the first node: it must be shared"
    dist.barrier()
    for path in (own, *([sign] if place.rank == 0 else [])):
        with contextlib.suppress(OSError):
            path.unlink()
    return problem


def _clock_offset() -> float:
    """Seconds that the clock of this process is ahead of the first one's, up to the time of a message."""
    dist.barrier()
    now = [time.time()]
    own = now[0]
    dist.broadcast_object_list(now, src=0)
    return own - now[0]


def _collective(accelerator: Accelerator | None, device: torch.device, patience: timedelta) -> str:
    """Why the devices cannot talk to each other; called by all processes, `accelerator` being None on those without."""
    size = dist.get_world_size()
    ready: list[bool] = [False] * size
    dist.all_gather_object(ready, accelerator is not None)
    if accelerator is None or not all(ready):
        return "not tried, as not every process has its device"
    try:
        make = accelerator.capabilities.communicator
        everybody = [list(range(size))]
        group = make(everybody) if make else dist.new_group(backend=accelerator.collective_backend, timeout=patience)
        number = torch.ones(1024, device=device)
        dist.all_reduce(number, group=group)
        accelerator.synchronize()
        total = number[0].item()
    except RuntimeError as error:
        return f"{accelerator.collective_backend}: {str(error).splitlines()[0]}"
    return "" if total == size else f"a sum over {size} processes of ones is {total}"
