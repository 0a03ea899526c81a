"""What goes wrong on one rank is one error on all, in words that help, and costs no earlier checkpoint."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from megatron.checkpoint import SaveError, TrainingState, check_writable, save
from tests.checkpoint.helpers import RUN, assert_holds, silent, small_state
from tests.support import run_ranks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one small checkpoint, which anybody may mount in namespaces of a process."""
    folder = tmp_path / "disk"
    folder.mkdir()
    script = f"mount -t tmpfs -o size=1m none {shlex.quote(str(folder))} && echo mounted && read end"
    with subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not process.stdout.readline():
            pytest.skip(f"no file system can be mounted here: {process.stderr.read().strip()}")
        # What that process sees. The system unmounts it when the process ends.
        yield Path(f"/proc/{process.pid}/root{folder}")
        process.communicate("end\n")


def test_full_disk(small_disk: Path) -> None:
    save(small_disk, 1, small_state(1.0), log=silent)
    for elements in (300_000, 10_000_000):
        with pytest.raises(SaveError) as caught:
            save(small_disk, 2, small_state(2.0, elements=elements), log=silent)
        message = str(caught.value)
        assert f"cannot save the checkpoint of iteration 2 in {small_disk}: rank 0: [Errno 28] No space left" in message
        assert "choose another folder (--save)" in message
        assert f"The last good checkpoint is iteration 1 in {small_disk / 'iter_0000001'}" in message
    # The room that the attempt took is free again.
    assert len(list(small_disk.iterdir())) == 2
    save(small_disk, 2, small_state(3.0), log=silent)
    assert_holds(small_disk, {3.0})


def _one_rank_cannot_write(root: str) -> str:
    rank = int(os.environ["RANK"])
    save(root, 1, TrainingState(tensors={"model.a": torch.ones(1000)}, progress={"value": 1}, run=RUN), log=silent)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    # Replicated tensors of one size are shared out evenly, so both ranks write.
    tensors = {f"model.{i}": torch.ones(100_000) for i in range(4)}
    with pytest.raises(SaveError) as caught:
        save(root, 2, TrainingState(tensors=tensors, progress={}, run=RUN), log=silent)
    return str(caught.value)


def test_a_rank_that_cannot_write_stops_all(tmp_path: Path) -> None:
    answers = run_ranks(2, _one_rank_cannot_write, str(tmp_path))
    assert answers[0] == answers[1]
    assert "rank 1: [Errno 27] File too large: " in answers[0]
    assert "__1_0.distcp" in answers[0]
    assert "rank 0" not in answers[0]
    assert "last good checkpoint is iteration 1" in answers[0]
    assert {p.name for p in tmp_path.iterdir()} == {"iter_0000001", "latest_checkpointed_iteration.txt"}


def _different_problems(root: str) -> list[str]:
    rank = int(os.environ["RANK"])
    answers = []

    def expect_error(tensors: dict[str, torch.Tensor]) -> None:
        with pytest.raises(SaveError) as caught:
            save(root, 2, TrainingState(tensors=tensors, progress={}, run=RUN), log=silent)
        answers.append(str(caught.value))

    expect_error({"model.a": "not a tensor" if rank == 1 else torch.ones(2)})  # type: ignore[dict-item]
    expect_error({"model.a": torch.ones(2 + rank)})
    mesh = init_device_mesh("cpu", (2,))
    expect_error({"model.a": DTensor.from_local(torch.ones(2), mesh, [Partial()])})
    return answers


def test_errors_of_one_rank_reach_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, _different_problems, str(tmp_path))
    assert first == second
    assert "rank 1: TypeError: model.a is str, not a tensor" in first[0]
    assert "is [2] torch.float32 on one rank, [3] torch.float32 on rank 1: it must be a DTensor" in first[1]
    assert "sums that are not yet taken cannot be saved" in first[2]
    assert "There is no earlier checkpoint" in first[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["a file", "a folder of the kernel"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "checkpoints" if below == "a file" else Path("/proc/checkpoints")
    with pytest.raises(SaveError, match=rf"written to {root}: rank 0: \[Errno .*\(--save\)"):
        check_writable(root)
    with pytest.raises(SaveError, match=rf"iteration 3 in {root}: rank 0: \[Errno .*\(--save\).* no earlier"):
        save(root, 3, small_state(), log=silent)


def test_a_folder_that_can_be_written(tmp_path: Path) -> None:
    run_ranks(2, check_writable, str(tmp_path / "new" / "folder"))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_progress_that_is_not_json(tmp_path: Path) -> None:
    for progress in ({"a": {1, 2}}, {"a": torch.ones(1)}):
        with pytest.raises(SaveError, match="not JSON serializable"):
            save(tmp_path, 1, TrainingState(tensors={}, progress=progress, run={}), log=silent)
    assert list(tmp_path.iterdir()) == []


def test_another_programs_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(SaveError, match=r"iter_0000003 is there already and is not a checkpoint of this format"):
        save(tmp_path, 3, small_state(), log=silent)
    assert (tmp_path / "iter_0000003" / "mp_rank_00").is_dir()
