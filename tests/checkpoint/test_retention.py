"""Which checkpoints stay, and what is cleaned up."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.checkpoint import list_checkpoints, save
from megatron.checkpoint.folder import obsolete
from tests.checkpoint.helpers import assert_holds, silent, small_state

TEN = range(10, 101, 10)


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "kept"),
    [
        (None, None, list(TEN)),
        (1, None, [100]),
        (3, None, [80, 90, 100]),
        (99, None, list(TEN)),
        (None, 50, [50, 100]),
        (None, 40, [40, 80, 100]),
        (2, 40, [40, 80, 90, 100]),
    ],
)
def test_what_is_kept(keep_last: int | None, retain_interval: int | None, kept: list[int]) -> None:
    doomed = obsolete(TEN, 100, keep_last=keep_last, retain_interval=retain_interval)
    assert sorted(set(TEN) - set(doomed)) == kept


def test_checkpoints_after_the_current_one_are_left_alone() -> None:
    """A run that was continued from iteration 40 must not lose what it writes to what it left behind."""
    assert obsolete(TEN, 50, keep_last=2, retain_interval=None) == [10, 20, 30]


@pytest.mark.parametrize(("keep_last", "retain_interval", "flag"), [(0, None, "--keep-last"), (1, -1, "--save-retain")])
def test_numbers_that_make_no_sense(keep_last: int, retain_interval: int | None, flag: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{flag}.* at least 1"):
        save(tmp_path, 1, small_state(), keep_last=keep_last, retain_interval=retain_interval, log=silent)


def test_saving_deletes_only_what_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    for iteration in range(2, 9):
        save(tmp_path, iteration, small_state(float(iteration)), keep_last=2, retain_interval=3, log=silent)
    assert list(list_checkpoints(tmp_path)) == [3, 6, 7, 8]
    assert (tmp_path / "iter_0000001" / "mp_rank_00").is_dir()
    assert (tmp_path / "notes.txt").exists()
    assert_holds(tmp_path, {8.0})


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    save(tmp_path, 1, small_state(1.0), log=silent)

    def refuse(path: Path, target: Path) -> None:
        if path.name == "iter_0000001":
            raise PermissionError(13, "Permission denied", str(path))
        original(path, target)

    original = Path.rename
    monkeypatch.setattr(Path, "rename", refuse)
    save(tmp_path, 2, small_state(2.0), keep_last=1, log=said.append)
    assert "WARNING: could not delete the old checkpoint" in said[-1]
    assert_holds(tmp_path, {2.0})


def test_leftovers_are_removed_and_a_checkpoint_half_replaced_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 1, small_state(1.0), log=silent)
    save(tmp_path, 2, small_state(2.0), log=silent)
    for name in (".iter_0000009.tmp-0123abcd", ".iter_0000005.deleted-0123abcd"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "deeper" / "file").touch()
    (tmp_path / ".latest_checkpointed_iteration.txt.tmp-0123abcd").touch()
    (tmp_path / ".write-test-0123abcd-3").touch()
    (tmp_path / ".mine").touch()
    (tmp_path / "iter_0000002").rename(tmp_path / ".iter_0000002.replaced-0123abcd")
    assert list(list_checkpoints(tmp_path)) == [1, 2]
    assert_holds(tmp_path, {2.0})
    save(tmp_path, 3, small_state(3.0), log=silent)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("iter_0000001", "iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt", ".mine")
    }
