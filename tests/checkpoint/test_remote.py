"""Checkpoints in object stores: what a kill leaves, what is replaced and deleted, and URLs of local folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from megatron.checkpoint import (
    CheckpointError,
    CorruptCheckpoint,
    Saver,
    SaveSettings,
    check_writable,
    latest,
    list_checkpoints,
    load,
    save,
)
from tests.checkpoint.helpers import Layout, assert_holds, read_and_write_again, silent, small_state, write_known
from tests.checkpoint.test_killed import in_child, kill_before_change
from tests.support import run_ranks


class _Opener(LocalFileOpener):
    """A file that appears when it is closed, as in an object store."""

    def close(self) -> None:
        if not self.closed:
            super().close()
            if "w" in self.mode:
                self.commit()

    def __exit__(self, *_: object) -> None:
        self.close()


class Bucket(LocalFileSystem):
    """Local files with the rules of an object store: a file is there as a whole or not at all, folders do not count."""

    protocol = "bucket"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("bucket://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"bucket://{self._strip_protocol(name)}"

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return _Opener(path, mode, fs=self, autocommit="w" not in mode)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass


fsspec.register_implementation("bucket", Bucket, clobber=True)


def _every_point(folder: str, iteration: int) -> int:
    """As in `test_killed`, for a store: the checkpoint of value 1 is of iteration 2, with an older one before it."""
    number = 0
    while True:
        local = Path(folder) / f"{number}"
        root = f"bucket://{local}"
        save(root, 1, small_state(0.5), log=silent)
        save(root, 2, small_state(1.0), log=silent)

        def action(root: str = root, local: Path = local, number: int = number) -> None:
            kill_before_change(str(local), number)
            save(root, iteration, small_state(2.0), log=silent)

        finished = in_child(action)
        allowed = {2.0} if finished else {1.0, 2.0} | ({0.5} if iteration == 2 else set())
        loaded = assert_holds(root, allowed)
        assert loaded.iteration == latest(root)
        if number % 4 == 0:
            save(root, 4, small_state(3.0), keep_last=1, log=silent)
            assert_holds(root, {3.0})
            assert {p.name for p in local.iterdir() if not p.is_dir() or any(p.iterdir())} == {
                *("iter_0000004", "latest_checkpointed_iteration.txt")
            }
        shutil.rmtree(local)
        if finished:
            return number
        number += 1


@pytest.mark.parametrize("iteration", [3, 2], ids=["new", "replacing"])
def test_killed_before_every_change(iteration: int, tmp_path: Path) -> None:
    [changes] = run_ranks(1, _every_point, str(tmp_path), iteration, init=False)
    assert changes > 6


def test_several_ranks_write_and_read(tmp_path: Path) -> None:
    run_ranks(2, _across, f"bucket://{tmp_path}")
    assert (tmp_path / "first" / "iter_0000007" / "__1_0.distcp").is_file()


def _across(root: str) -> None:
    check_writable(root)
    write_known(f"{root}/first", Layout(tp=2))
    read_and_write_again(f"{root}/first", f"{root}/second", Layout(dp=2, fsdp=True))


def test_in_memory() -> None:
    root = "memory://checkpoints"
    said: list[str] = []
    saver = Saver(root, SaveSettings(background=True, keep_last=2, verify=True), log=said.append)
    for iteration in (1, 2, 3):
        saver.save(iteration, small_state(float(iteration)))
    saver.finish()
    assert list(list_checkpoints(root)) == [2, 3]
    assert_holds(root, {3.0})
    store = fsspec.filesystem("memory")
    name = "/checkpoints/iter_0000003/__0_0.distcp"
    content = bytearray(store.cat_file(name))
    content[len(content) // 2] ^= 4
    store.pipe_file(name, bytes(content))
    into = dict(small_state().tensors)
    with pytest.raises(CorruptCheckpoint, match="__0_0"):
        load(root, into=into, verify=True, log=silent)
    loaded = load(root, into=into, verify=True, fallback=True, log=silent)
    assert loaded is not None and loaded.iteration == 2


def test_a_url_of_a_local_folder_is_that_folder(tmp_path: Path) -> None:
    save(f"file://{tmp_path}", 1, small_state(1.0), log=silent)
    assert_holds(tmp_path, {1.0})


def test_a_kind_that_is_not_known() -> None:
    with pytest.raises(CheckpointError, match="nowhere://bucket"):
        save("nowhere://bucket/run", 1, small_state(), log=silent)
