"""Speed of the data path: preprocessing, index building, reading.

    python -m benchmarks.data preprocess --megabytes 200 --rounds 3
    python -m benchmarks.data index --peer-python /path/to/venv/bin/python
    python -m benchmarks.data read

Every run is a process of its own; sides take turns, and medians over the rounds are compared, in CPU-seconds first,
because shared machines are noisy. `preprocess` compares the command with the `tokenizers` library alone, which reads
the same jsonl and keeps the ids; `--peer-python` names a Python that has megatron-core, whose index helpers and
shuffle `index` is compared with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
_TRAINED_ON = 30_000_000
_LARGEST_FILE = 2_000_000
_ENDINGS = (".py", ".pyi", ".h", ".hpp", ".md", ".rst", ".txt")
_SEQ = 4096
_MB = 1e6

_TOKENIZERS_ALONE = """
import json, sys
import numpy, tokenizers
engine = tokenizers.Tokenizer.from_file(sys.argv[2])
texts, parts = [], []
def flush():
    for row in engine.encode_batch_fast(texts, add_special_tokens=False):
        parts.append(numpy.array(row.ids, numpy.uint16))
    texts.clear()
with open(sys.argv[1]) as file:
    for line in file:
        texts.append(json.loads(line)["text"])
        if len(texts) == 128:
            flush()
flush()
print(sum(map(len, parts)))
"""

_MEGATRON_CORE = """
import json, sys, time
import numpy
from megatron.core.datasets import helpers_cpp
lengths, seq = numpy.load(sys.argv[1]), int(sys.argv[2])
began, cpu = time.perf_counter(), time.process_time()
rng = numpy.random.RandomState(1234)
documents = numpy.arange(len(lengths), dtype=numpy.int32)
rng.shuffle(documents)
shuffled = time.process_time() - cpu
rows = helpers_cpp.build_sample_idx_int32(lengths, documents, seq, 1, int(lengths.sum()), True, 1)
order = numpy.arange(len(rows) - 1, dtype=numpy.uint32)
rng.shuffle(order)
print(json.dumps([time.process_time() - cpu, time.perf_counter() - began, int(rows.astype(numpy.int64).sum())]))
"""

_OUR_INDEX = """
import json, sys, time
from pathlib import Path
import numpy
from megatron.data.gpt_dataset import GPTDataset, SampleRequest
from megatron.data.index_cache import IndexCache
class Source:
    name, lengths = "the made-up corpus", numpy.load(sys.argv[1])
    def fingerprint(self):
        import hashlib
        return hashlib.sha256(self.lengths.view(numpy.uint8).data).hexdigest()
source = Source()
cache = IndexCache(folder=Path(sys.argv[3]), report=lambda line: None) if len(sys.argv) > 3 else None
request = SampleRequest(first=0, last=len(source.lengths), num_samples=None, seq_length=int(sys.argv[2]), seed=1234)
began, cpu = time.perf_counter(), time.process_time()
data = GPTDataset(source, request, vocab_size=50000, cache=cache)
done = [time.process_time() - cpu, time.perf_counter() - began, int(data.index.samples.astype(numpy.int64).sum())]
print(json.dumps(done))
"""


@dataclass(frozen=True)
class Cost:
    """What a process took, in seconds, and what it printed."""

    cpu: float
    wall: float
    said: str


def measured(command: Sequence[object], *, ours: bool = True) -> Cost:
    """Run a command to its end; where it is not ours, our `megatron` must not be found in place of another."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if ours:
        environment["PYTHONPATH"] = str(ROOT)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [str(word) for word in command]
    folder = ROOT if ours else "/"
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words[:4])} failed: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, time.perf_counter() - began, done.stdout)


def documents() -> Iterator[str]:
    """Sources, headers and manuals of this Python and its packages, each file once."""
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for ending in _ENDINGS:
            for file in sorted(Path(root).rglob(f"*{ending}")):
                if file.is_file() and file.stat().st_size < _LARGEST_FILE:
                    try:
                        text = file.read_text(encoding="utf-8")
                    except UnicodeDecodeError:
                        continue
                    if text.strip():
                        yield text


def write_corpus(file: Path, megabytes: int) -> None:
    """A jsonl of about this size."""
    size = 0
    with file.open("w") as stream:
        for text in documents():
            size += stream.write(json.dumps({"text": text}) + "\n")
            if size >= megabytes * _MB:
                return
    print(f"this Python has only {size / _MB:.0f} MB of text", file=sys.stderr)


def head(file: Path, target: Path, size: int) -> Path:
    """The first lines of a file, about `size` bytes."""
    with file.open("rb") as stream:
        target.write_bytes(stream.read(size).rpartition(b"\n")[0] + b"\n")
    return target


def preprocess(args: argparse.Namespace) -> list[str]:
    """Rows of a table: MB per CPU-second and per second of wall, of jsonl."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, args.megabytes)
        part = head(corpus, folder / "part.jsonl", args.peer_megabytes * 1_000_000)
        sample = head(corpus, folder / "sample.jsonl", _TRAINED_ON)
        flags = ("--input", sample, "--output", folder / "tokenizer", "--vocab-size", 32000)
        measured([sys.executable, "tools/train_tokenizer.py", *flags])
        tool = [sys.executable, "tools/preprocess_data.py", "--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
        tool += ["--tokenizer-model", folder / "tokenizer", "--log-interval", 10**9]
        alone = [sys.executable, "-c", _TOKENIZERS_ALONE, part, folder / "tokenizer" / "tokenizer.json"]
        sides: dict[str, tuple[Path, list[object]]] = {
            f"ours, {workers} worker(s)": (
                corpus,
                [*tool, "--input", corpus, "--output-prefix", folder / f"w{workers}"],
            )
            for workers in args.workers
        }
        for workers, side in zip(args.workers, list(sides), strict=True):
            sides[side][1].extend(["--workers", workers])
        own = [*tool, "--input", part, "--output-prefix", folder / "own", "--tokenizer-engine", "own"]
        fast = [*tool, "--input", part, "--output-prefix", folder / "fast"]
        sides |= {"ours, --tokenizer-engine own": (part, own), "`tokenizers` alone": (part, alone)}
        costs = alternate({name: lambda c=command: measured(c) for name, (_, command) in sides.items()}, args.rounds)
        measured(fast)
        same = _digest(folder / "own_text_document.bin") == _digest(folder / "fast_text_document.bin")
        rows = ["| side | MB | CPU-s | wall s | MB / CPU-s | MB / s |", "|---|---|---|---|---|---|"]
        for side, (file, _) in sides.items():
            megabytes = file.stat().st_size / _MB
            cpu, wall = (statistics.median(getattr(cost, key) for cost in costs[side]) for key in ("cpu", "wall"))
            rates = f"{megabytes / cpu:.1f} | {megabytes / wall:.1f}"
            rows.append(f"| {side} | {megabytes:.0f} | {cpu:.2f} | {wall:.2f} | {rates} |")
        rows += [
            "",
            f"Token ids of both engines on {part.stat().st_size / _MB:.0f} MB: {'the same' if same else 'DIFFERENT'}.",
        ]
        return rows


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def alternate(sides: dict[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    """Costs of each side, taking turns."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in sides.items():
            costs[name].append(run())
            print(
                f"round {number + 1}, {name}: {costs[name][-1].cpu:.2f} CPU-s, {costs[name][-1].wall:.2f} s",
                file=sys.stderr,
            )
    return costs


def index(args: argparse.Namespace) -> list[str]:
    """Rows of a table: seconds for the sample order of 10M documents."""
    with tempfile.TemporaryDirectory() as name:
        lengths = np.random.default_rng(0).integers(10, 1200, args.documents).astype(np.int32)
        np.save(f"{name}/lengths.npy", lengths)
        ours = [sys.executable, "-c", _OUR_INDEX, f"{name}/lengths.npy", _SEQ]
        sides = {"ours, in memory": ours, "ours, built into an empty cache": [*ours, f"{name}/cache"]}
        if args.peer_python:
            sides["megatron-core"] = [args.peer_python, "-c", _MEGATRON_CORE, f"{name}/lengths.npy", _SEQ]
        found: dict[str, list[list[float]]] = {side: [] for side in [*sides, "ours, resumed from the cache"]}
        for _ in range(args.rounds):
            for side, command in sides.items():
                found[side].append(json.loads(measured(command, ours=side.startswith("ours")).said))
            found["ours, resumed from the cache"].append(json.loads(measured([*ours, f"{name}/cache"]).said))
            for file in Path(f"{name}/cache").iterdir():
                file.unlink()
        sums = {int(run[2]) for runs in found.values() for run in runs}
        rows = [f"{args.documents:,} documents, {lengths.sum():,} tokens, sequences of {_SEQ}.", ""]
        rows += ["| side | CPU-s | wall s |", "|---|---|---|"]
        for side, runs in found.items():
            cpu, wall = (statistics.median(run[i] for run in runs) for i in (0, 1))
            rows.append(f"| {side} | {cpu:.3f} | {wall:.3f} |")
        return [*rows, "", f"Sum over the sample index: {'the same' if len(sums) == 1 else 'DIFFERENT'} on all sides."]


def read(args: argparse.Namespace) -> list[str]:
    """Rows of a table: tokens per CPU-second from a blend that was just built, and the memory of a huge order."""
    from megatron.data.datasets import build_datasets
    from megatron.data.indexed_writer import IndexedDatasetWriter
    from megatron.data.settings import DataSettings, SampleCounts

    rng = np.random.default_rng(0)
    rates = []
    with tempfile.TemporaryDirectory() as name:
        words = []
        for number in range(args.blend):
            with IndexedDatasetWriter(f"{name}/{number}", np.uint16) as writer:
                for length in rng.integers(100, 2000, 200):
                    writer.add_document(rng.integers(0, 32000, length).astype(np.uint16))
            words += [str(1 + number % 7), f"{name}/{number}"]
        settings = DataSettings(
            seq_length=_SEQ, seed=1, data_path=tuple(words), split="1", data_cache_path=Path(name) / "c"
        )
        counts = SampleCounts(train=20_000, valid=0, test=0)
        built = build_datasets(settings, counts, vocab_size=32000, eod=0, report=lambda line: None).train
        assert built is not None
        for _ in range(args.rounds):
            began = time.process_time()
            tokens = sum(len(built[i]) for i in range(5_000))
            rates.append(tokens / (time.process_time() - began))
        memory = json.loads(measured([sys.executable, "-c", _HUGE, name, 10**9]).said)
    return [
        f"Blend of {args.blend} corpora, samples of {_SEQ} tokens, one process: {statistics.median(rates) / 1e6:.0f}M "
        "tokens per CPU-second.",
        "",
        f"Loader over an order of 10^9 samples, 2,000 read: {memory[0]:.0f} MB of its own and {memory[1]:.0f} MB "
        "of mapped pages, which the system takes back when it needs them, above what the imports take.",
    ]


_HUGE = """
import json, random, sys
from pathlib import Path
import numpy
from numpy.lib.format import open_memmap
from megatron.data.sample_index import map_sample_index
from megatron.data.samplers import SequentialSampler, Share
def resident():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[kind].split()[0]) * 1024 / 1e6 for kind in ("RssAnon", "RssFile")]
folder, size = Path(sys.argv[1]), int(sys.argv[2])
shapes = {"documents": ((size // 4,), "<i4"), "order": ((size + 1, 2), "<i4"), "shuffle": ((size,), "<u4")}
for name, (shape, dtype) in shapes.items():
    open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
before = resident()
index = map_sample_index(tuple(folder / f"{name}.npy" for name in shapes))
sampler = SequentialSampler(total=len(index), start=0, share=Share(micro_batch_size=4))
for _, batch in zip(range(500), sampler):
    for reference in batch:
        row = int(index.shuffle[reference.index]) + random.randrange(size)
        index.samples[row : row + 2].tolist()
assert len(index) == size
print(json.dumps([after - start for after, start in zip(resident(), before)]))
"""


def main() -> None:
    """Measure one part and print its section of the results page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["preprocess", "index", "read"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=200, help="of jsonl, for our side")
    parser.add_argument("--peer-megabytes", type=int, default=20, help="of jsonl, for the slow sides")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--peer-python", help="a Python that has megatron-core")
    parser.add_argument("--blend", type=int, default=100, help="corpora in the blend")
    args = parser.parse_args()
    rows = {"preprocess": preprocess, "index": index, "read": read}[args.part](args)
    processor = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "?")
    command = f"python -m benchmarks.data {' '.join(sys.argv[1:])}"
    print(f"\n## {args.part}\n\n`{command}`, medians of {args.rounds} rounds, ", end="")
    print(f"{processor}, {os.cpu_count()} processors, Python {platform.python_version()}.\n")
    print("\n".join(rows))


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    main()
