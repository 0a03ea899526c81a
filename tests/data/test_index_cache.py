"""Many processes, crashed builders, damaged and unwritable caches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron.data.errors import DataError
from megatron.data.index_cache import IndexCache, Waiting, load_array
from tests.support import run_ranks

QUICK = Waiting(poll=0.02, heartbeat=0.05, stale_after=60, give_up_after=60, report_every=0.2)


def cache_in(folder: Path, lines: list[str], waiting: Waiting = QUICK) -> IndexCache:
    return IndexCache(folder=folder, report=lines.append, waiting=waiting)


def arrays() -> dict[str, np.ndarray]:
    return {"one": np.arange(1000), "two": np.ones((3, 2), np.int32)}


def build_once(folder: str) -> tuple[int, list[str], int]:
    """What a rank does: count own builds, then read."""
    import torch.distributed as dist

    built = []
    lines: list[str] = []

    def build() -> dict[str, np.ndarray]:
        built.append(1)
        time.sleep(1)
        return arrays()

    dist.barrier()
    paths = cache_in(Path(folder), lines).load_or_build("x", {"n": 1}, build)
    return len(built), lines, int(load_array(paths["one"]).sum())


@pytest.mark.slow
def test_one_of_many_builds_and_the_others_wait(tmp_path):
    results = run_ranks(4, build_once, str(tmp_path / "cache"))
    assert sum(built for built, _, _ in results) == 1
    assert all(total == 999 * 500 for _, _, total in results)
    assert any("waiting for process" in line for _, lines, _ in results for line in lines)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy", ".npy"]


def test_what_is_built_is_not_built_again(tmp_path):
    cache = cache_in(tmp_path, [])
    first = cache.load_or_build("x", {"n": 1}, arrays)
    assert cache.load_or_build("x", {"n": 1}, dict) == first
    assert cache.load_or_build("x", {"n": 2}, arrays) != first


CRASHING = """
import sys, time
from pathlib import Path
from megatron.data.index_cache import IndexCache
def build():
    print("building", flush=True)
    time.sleep(60)
IndexCache(folder=Path(sys.argv[1]), report=lambda line: None).load_or_build("x", {"n": 1}, build)
"""


@pytest.fixture
def builder_in(tmp_path):
    """A process that holds the lock of the cache in tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", CRASHING, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_builder_is_replaced_at_once(tmp_path, builder_in):
    builder_in.kill()
    builder_in.wait()
    lines: list[str] = []
    patient = Waiting(poll=0.02, heartbeat=0.05, stale_after=1000, give_up_after=1000)
    paths = cache_in(tmp_path, lines, patient).load_or_build("x", {"n": 1}, arrays)
    assert load_array(paths["one"]).tolist() == list(range(1000))
    assert any("taking over" in line for line in lines)


def test_a_builder_without_heartbeat_is_replaced_after_a_while(tmp_path, builder_in):
    builder_in.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    waiting = Waiting(poll=0.02, heartbeat=0.05, stale_after=0.6, give_up_after=60)
    cache_in(tmp_path, [], waiting).load_or_build("x", {"n": 1}, arrays)
    assert time.monotonic() - began >= waiting.stale_after


@pytest.mark.slow
def test_a_living_builder_is_not_waited_for_without_end(tmp_path, builder_in):
    impatient = Waiting(poll=0.02, heartbeat=2, stale_after=30, give_up_after=0.3)
    with pytest.raises(DataError, match=rf"process {builder_in.pid} on .* remove .*\.lock"):
        cache_in(tmp_path, [], impatient).load_or_build("x", {"n": 1}, arrays)


def test_a_failed_build_frees_the_way(tmp_path):
    def fail() -> dict[str, np.ndarray]:
        raise DataError("no tokens")

    with pytest.raises(DataError, match="no tokens"):
        cache_in(tmp_path, []).load_or_build("x", {"n": 1}, fail)
    assert list(tmp_path.iterdir()) == []
    assert cache_in(tmp_path, []).load_or_build("x", {"n": 1}, arrays)


@pytest.mark.parametrize("damage", ["truncate", "other array", "remove", "description"])
def test_a_damaged_entry_is_built_again(damage, tmp_path):
    paths = cache_in(tmp_path, []).load_or_build("x", {"n": 1}, arrays)
    if damage == "truncate":
        os.truncate(paths["one"], 300)
    elif damage == "other array":
        np.save(paths["one"], np.arange(3))
    elif damage == "remove":
        paths["two"].unlink()
    else:
        next(tmp_path.glob("*.json")).write_text("{")
    lines: list[str] = []
    again = cache_in(tmp_path, lines).load_or_build("x", {"n": 1}, arrays)
    assert load_array(again["one"]).tolist() == list(range(1000))
    assert any("building it again" in line for line in lines)


def test_a_folder_that_cannot_be_written_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-cache-path"):
        cache_in(tmp_path / "file" / "cache", []).load_or_build("x", {"n": 1}, arrays)
