"""Kills ranks of training runs at random moments and looks at what is left.

    python -m tests.checkpoint.kills --count 50

A run on two ranks saves every few iterations, from start to start by turns before training goes on and while it does.
After a random number of iterations one of its ranks gets SIGKILL, at once or in the middle of the next save. The other
one must end by itself, the checkpoint that the tracker names must be whole, and the next start must go on from it. A
run that comes to its end must have the losses and gradient norms of one that nobody disturbed, to the last bit.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron.checkpoint.folder import TRACKER, latest, list_checkpoints
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.verify import file_faults
from megatron.training.metrics import read_metrics
from tests.parity import MODEL, TRAINING, train
from tests.support import free_port, rank_process, worker_context

RANKS = 2
ITERATIONS = 120
SAVE_INTERVAL = 3
SECONDS_TO_END = 60.0
"""For the surviving rank; the load of the machine is part of it."""
SECONDS_TO_BEGIN = 240.0
_MOST_ITERATIONS = 15
_MOST_SECONDS_MORE = 0.03
_SECONDS_TO_SAVE = 30.0
_POLL = 0.002
_MODES = {"sync": (), "async": ("--async-save",)}


@dataclass
class Findings:
    """What the kills came to."""

    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    slowest_end: float = 0.0
    """Seconds from the kill to the end of the surviving rank."""
    runs_finished: int = 0

    def __str__(self) -> str:
        moments = ", ".join(f"{count} {name}" for name, count in sorted(self.moments.items()))
        return (
            f"{self.kills} kills ({moments}); the surviving rank ended after at most {self.slowest_end:.1f} s; "
            f"{self.runs_finished} runs came to their end with the losses of the undisturbed one"
        )


def argv(folder: Path, mode: str) -> list[str]:
    """The command of a run."""
    return [
        *(*MODEL, *TRAINING, "--mock-data", "--train-iters", str(ITERATIONS)),
        *("--save", str(folder / "saved"), "--save-interval", str(SAVE_INTERVAL), "--auto-resume", "--keep-last", "2"),
        *("--log-json", str(folder / "metrics.jsonl"), *_MODES[mode]),
    ]


def start(words: Sequence[str], folder: Path) -> list[BaseProcess]:
    """One life of a run: its ranks."""
    port = free_port()
    main = functools.partial(train, list(words))
    ranks = [
        worker_context().Process(target=rank_process, args=(main, rank, RANKS, port, str(folder / f"rank{rank}.log")))
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """Iteration, loss and gradient norm of every step."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["iteration"], r["lm_loss"], r["grad_norm"]) for r in records if r["kind"] == "train"]


def finish(words: Sequence[str], folder: Path) -> list[tuple[Any, ...]]:
    """Let a run come to its end."""
    ranks = start(words, folder)
    for rank in ranks:
        rank.join(SECONDS_TO_BEGIN + SECONDS_TO_END)
    codes = [rank.exitcode for rank in ranks]
    assert codes == [0] * RANKS, (codes, _logs(folder))
    return curve(folder)


def one_life(folder: Path, mode: str, dice: random.Random, findings: Findings) -> bool:
    """Start a run, kill a rank and look at what is left; whether the run had come to its end before."""
    began = time.time()
    ranks = start(argv(folder, mode), folder)
    moment = _wait_for_moment(folder, ranks, began, dice)
    if moment is None:
        for rank in ranks:
            rank.join(SECONDS_TO_END)
        assert [rank.exitcode for rank in ranks] == [0] * RANKS, _logs(folder)
        return True
    victim = dice.choice(ranks)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    for rank in ranks:
        rank.join(SECONDS_TO_END)
        if rank.is_alive():
            rank.kill()
            raise AssertionError(f"a rank was still alive {SECONDS_TO_END:.0f} s after the other one was killed")
    findings.kills += 1
    findings.moments[f"{mode} {moment}"] += 1
    findings.slowest_end = max(findings.slowest_end, time.monotonic() - killed)
    assert all(rank.exitcode != 0 for rank in ranks) or _complete(folder)
    assert_whole(folder / "saved")
    return False


def _complete(folder: Path) -> bool:
    return curve(folder)[-1][0] == ITERATIONS


def _logs(folder: Path) -> list[str]:
    return [log.read_text()[-2000:] for log in folder.glob("rank*.log")]


def _wait_for_moment(folder: Path, ranks: Sequence[BaseProcess], began: float, dice: random.Random) -> str | None:
    """Wait for the moment to kill and return which it is; None if the run ends before."""
    target, wait_for_save = dice.randint(0, _MOST_ITERATIONS), dice.random() < 0.5
    reached, saving = 0.0, float("inf")
    deadline = time.monotonic() + SECONDS_TO_BEGIN
    while time.monotonic() < min(deadline, saving):
        if any(rank.exitcode is not None for rank in ranks):
            return None
        in_save = any((folder / "saved").glob(".iter_*.tmp-*"))
        if reached and in_save:
            break
        if not reached and _iterations(folder, began) >= target:
            reached = time.monotonic()
            saving = reached + (_SECONDS_TO_SAVE if wait_for_save else 0.0)
        time.sleep(_POLL)
    assert reached, ("the run does not begin", _logs(folder))
    time.sleep(dice.uniform(0.0, _MOST_SECONDS_MORE))
    if any(rank.exitcode is not None for rank in ranks):
        return None
    return "in a save" if any((folder / "saved").glob(".iter_*")) else "in training"


def _iterations(folder: Path, began: float) -> int:
    """Iterations that were logged since a moment (seconds since 1970); -1 before the run has begun."""
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    own = [record["kind"] for record in records if record["time"] >= began]
    return own.count("train") if "start" in own else -1


def assert_whole(saved: Path) -> None:
    """What a run would go on from is whole; there may be nothing yet."""
    found = latest(saved)
    if found is None:
        assert not (saved / TRACKER).exists()
        return
    path = list_checkpoints(saved)[found]
    assert file_faults(path, read_manifest(path)) == []


def kill(count: int, seed: int, folder: Path, modes: Sequence[str] = tuple(_MODES)) -> Findings:
    """Kill `count` ranks of runs in the modes by turns; raises AssertionError at the first thing that is wrong."""
    dice, findings = random.Random(seed), Findings()
    expected = finish(argv(folder / "undisturbed", modes[0]), _made(folder / "undisturbed"))
    assert [record[0] for record in expected] == list(range(1, ITERATIONS + 1))
    number = 0
    while findings.kills < count:
        here = _made(folder / f"run{number}")
        ended = False
        while not ended and findings.kills < count:
            ended = one_life(here, modes[findings.kills % len(modes)], dice, findings)
            print(findings, flush=True)
        found = curve(here) if ended else finish(argv(here, modes[0]), here)
        assert found == expected, f"the losses of run {number} differ"
        assert_whole(here / "saved")
        findings.runs_finished += 1
        number += 1
    return findings


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> int:
    """Kill and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="how many ranks are killed")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and of which rank it is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(kill(args.count, args.seed, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
