"""Speed and peak memory of tools/convert_checkpoint.py, against loading everything and saving it again.

    python -m benchmarks.convert_checkpoint --layers 22 --hidden 2048 --rounds 3

Makes a random LLaMA in bfloat16, then converts it from Hugging Face's format to every other one and back. Every
conversion is a process of its own; its memory is read from /proc while it runs. "own" is the memory that the process
allocates, which is what a machine must have; "resident" includes mapped files, which the system drops when it needs
room. The twin reads all tensors with safetensors and writes them again. Files are in the cache of the system, and every
writer waits until the disk has them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.formats import StoredModel, WriteOptions, convert
from megatron.checkpoint.formats.lazy import LazyTensors
from megatron.checkpoint.formats.model import parameter_shapes
from megatron.checkpoint.manifest import TensorRecord
from megatron.config.architecture import Architecture

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "native": (),
    "megatron": ("--target-tensor-parallel-size", "4", "--target-pipeline-parallel-size", "2"),
    "deepspeed": ("--target-tensor-parallel-size", "4", "--target-pipeline-parallel-size", "2"),
    "universal": (),
    "torch_dist": (),
    "nxd": ("--target-tensor-parallel-size", "8", "--target-pipeline-parallel-size", "2"),
}
_TWIN = """
import os, sys
from safetensors.torch import load_file, save_file
source, target = sys.argv[1:]
os.mkdir(target)
for name in sorted(os.listdir(source)):
    if name.endswith(".safetensors"):
        save_file(load_file(f"{source}/{name}"), f"{target}/{name}")
        with open(f"{target}/{name}", "rb") as file:
            os.fsync(file.fileno())
"""
_IDLE = "import megatron.checkpoint.formats, megatron.training.failures; import time; time.sleep(0.5)"
_SECONDS_BETWEEN_LOOKS = 0.01


@dataclass(frozen=True)
class Measured:
    """One process: seconds, and peaks in MB (10^6 bytes) of its own memory and of what was resident."""

    seconds: float
    own: float
    resident: float


def measure(command: Sequence[object]) -> Measured:
    """Run a process and watch its memory."""
    started = time.monotonic()
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    own = resident = 0
    while process.poll() is None:
        own = max(own, _status(process.pid, "RssAnon:"))
        resident = max(resident, _status(process.pid, "VmHWM:"))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return Measured(time.monotonic() - started, own / 1e6, resident / 1e6)


def _status(pid: int, key: str) -> int:
    """Bytes of one line in /proc/PID/status; 0 when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def make_model(arch: Architecture, folder: Path) -> int:
    """Write a random model as a Hugging Face folder; returns its size in bytes."""
    shapes = parameter_shapes(arch)

    def read(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02)

    records = {name: TensorRecord(shape, "bfloat16") for name, shape in shapes.items()}
    model = StoredModel(arch=arch, weights=LazyTensors(records, read))
    convert(model, "hf", folder, WriteOptions(max_shard_bytes=2 * 10**9))
    return model.weights.bytes


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="of the model")
    parser.add_argument(
        "--hidden", type=int, default=2048, help="of the model; 64 elements per head, 4 key-value heads"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    arch = Architecture(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.hidden // 64,
        num_kv_heads=4,
        head_dim=64,
        ffn_hidden_size=args.hidden * 11 // 4,
        vocab_size=32000,
        padded_vocab_size=32000,
        max_positions=2048,
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = measure_all(arch, Path(name), args.rounds)
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


def measure_all(arch: Architecture, folder: Path, rounds: int) -> list[dict[str, object]]:
    """Every conversion, printed as it is done."""
    size = make_model(arch, folder / "hf") / 1e6
    shapes = parameter_shapes(arch)
    largest = max(torch.Size(shape).numel() * 2 for shape in shapes.values()) / 1e6
    idle = measure([sys.executable, "-c", _IDLE])
    print(f"{arch.num_parameters():,} parameters, {size:,.0f} MB, largest tensor {largest:,.0f} MB; ", end="")
    print(f"the idle program: {idle.own:,.0f} MB own")
    rows: list[dict[str, object]] = []

    def report(what: str, command: Sequence[object], target: Path, idle_own: float) -> None:
        results = []
        for _ in range(rounds):
            subprocess.run(["rm", "-rf", target], check=True)
            results.append(measure(command))
        seconds = statistics.median(result.seconds for result in results)
        own = max(result.own for result in results) - idle_own
        resident = max(result.resident for result in results)
        figures = f"{seconds:6.1f} s {size / seconds:7.0f} MB/s, own {own:7.0f} MB more, resident {resident:7.0f} MB"
        print(f"{what:22} {figures}", flush=True)
        row = {
            "what": what,
            "seconds": seconds,
            "mb_per_second": size / seconds,
            "own_mb": own,
            "resident_mb": resident,
        }
        rows.append(row)

    tool = [sys.executable, "tools/convert_checkpoint.py"]
    for kind, layout in TARGETS.items():
        there, back = folder / kind, folder / "back"
        report(
            f"hf -> {kind}", [*tool, "--to", kind, "--load", folder / "hf", "--save", there, *layout], there, idle.own
        )
        command = [*tool, "--to", "hf", "--load", there, "--save", back]
        report(f"{kind} -> hf", [*command, *(("--dtype", "bf16") if kind == "universal" else ())], back, idle.own)
        subprocess.run(["rm", "-rf", there, back], check=True)
    report("load all, save all", [sys.executable, "-c", _TWIN, folder / "hf", folder / "twin"], folder / "twin", 0.0)
    return rows


if __name__ == "__main__":
    main()
