"""What a checkpoint costs: how long training stands still, speed of saving and loading, memory; against `torch.save`.

    python -m benchmarks.checkpoint --parameters 80e6 --rounds 5 --folder /data/tmp
    torchrun --nproc_per_node 2 -m benchmarks.checkpoint --parameters 80e6

The state is that of a run with Adam: float32 weights and two moments in tensors of 4 million elements, which the ranks
share. Ways to save it take turns, and every figure is the median of the rounds, of the slowest rank. Each way waits
until the disk has everything; only "async" lets training go on before. `torch.save` writes the state of each rank to
one file and syncs it: no hashes, no manifest, no other layout. Files are read from the system's cache where it has
them. Memory is the growth of what is resident, at its peak; the copy that "async" keeps from the first save on is not
part of it. On a machine that others use, only the seconds of the processor mean something.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megatron.checkpoint import Saver, SaveSettings, TrainingState, load, save

_COLUMNS = 2048
_KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Measured:
    """One call: seconds until it returned, seconds until the disk had everything, seconds of the processor of all
    threads, and memory it took in bytes.
    """

    stall: float
    whole: float
    processor: float
    memory: int


def make_state(parameters: int, ranks: int) -> dict[str, Tensor]:
    """Tensors of 2048 x 2048 float32 elements, the rows shared by the ranks."""
    mesh = init_device_mesh("cpu", (ranks,)) if ranks > 1 else None
    tensors: dict[str, Tensor] = {}
    for number in range(math.ceil(parameters / _COLUMNS**2)):
        for kind in _KINDS:
            local = torch.randn(_COLUMNS // ranks, _COLUMNS)
            whole = local if mesh is None else DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            tensors[f"{kind}.layers.{number}.weight"] = whole
    return tensors


def measure(begin: Callable[[], object], finish: Callable[[], object] = lambda: None) -> Measured:
    """Time and memory of a call and of what it leaves to be finished; the slowest and largest rank counts."""
    if dist.is_initialized():
        dist.barrier()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _status("VmRSS:")
    started, processor = time.perf_counter(), time.process_time()
    begin()
    stall = time.perf_counter() - started
    finish()
    whole, processor = time.perf_counter() - started, time.process_time() - processor
    figures = [stall, whole, processor, float(_status("VmHWM:") - before)]
    if dist.is_initialized():
        highest = torch.tensor(figures, dtype=torch.float64)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        figures = highest.tolist()
    return Measured(*figures[:3], int(figures[3]))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _torch_save(tensors: Mapping[str, Tensor], path: Path) -> None:
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    with path.open("wb") as file:
        torch.save(local, file)
        file.flush()
        os.fsync(file.fileno())


def _silent(_: str) -> None:
    pass


def one_round(tensors: dict[str, Tensor], folder: Path, saver: Saver, rank: int) -> dict[str, Measured]:
    """Every way once."""
    state = TrainingState(tensors=tensors, progress={}, run={})
    plain = folder / f"plain{rank}.pt"
    found = {
        "torch.save": measure(lambda: _torch_save(tensors, plain)),
        "save": measure(lambda: save(folder / "sync", 1, state, log=_silent)),
        "save --verify-checkpoint": measure(lambda: save(folder / "verified", 1, state, verify=True, log=_silent)),
        "save --async-save": measure(lambda: saver.save(1, state), saver.finish),
        "torch.load": measure(lambda: torch.load(plain)),
        "load --no-load-verify": measure(lambda: load(folder / "sync", into=tensors, log=_silent)),
        "load": measure(lambda: load(folder / "sync", into=tensors, verify=True, log=_silent)),
    }
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        for name in ("sync", "verified"):
            shutil.rmtree(folder / name)
    plain.unlink()
    return found


def table(rounds: list[dict[str, Measured]], size: int) -> list[dict[str, object]]:
    """One row per way; medians."""
    by_way: dict[str, list[Measured]] = defaultdict(list)
    for found in rounds:
        for way, measured in found.items():
            by_way[way].append(measured)
    return [
        {
            "way": way,
            "stall_s": statistics.median(m.stall for m in all_measured),
            "processor_s": statistics.median(m.processor for m in all_measured),
            "mb_per_s": size / 1e6 / statistics.median(m.whole for m in all_measured),
            "memory_mb": statistics.median(m.memory for m in all_measured) / 1e6,
        }
        for way, all_measured in by_way.items()
    ]


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=80e6, help="of the model; 12 bytes each")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder); shared by the ranks")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_num_threads(1)
    name = [tempfile.mkdtemp(dir=args.folder)] if rank == 0 else [""]
    if ranks > 1:
        dist.broadcast_object_list(name)
    folder = Path(name[0])
    tensors = make_state(int(args.parameters), ranks)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    group = dist.new_group(backend="gloo") if ranks > 1 else None
    saver = Saver(folder / "async", SaveSettings(background=True), group=group, log=_silent)
    one_round(tensors, folder, saver, rank)  # a first one that does not count
    rows = table([one_round(tensors, folder, saver, rank) for _ in range(args.rounds)], size)
    if rank == 0:
        shutil.rmtree(folder)
        print(
            f"{size / 1e6:,.0f} MB, {ranks} ranks, torch {torch.__version__}, Python {platform.python_version()}, ",
            end="",
        )
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {args.rounds} rounds")
        for row in rows:
            print(f"{row['way']:26} stands still {row['stall_s']:7.3f} s {row['mb_per_s']:7.0f} MB/s ", end="")
            print(f"{row['processor_s']:7.3f} s of the processor {row['memory_mb']:7.0f} MB more memory")
        if args.output is not None:
            args.output.write_text(json.dumps(rows, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
