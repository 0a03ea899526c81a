"""Damage to any file is found and the file is named; another checkpoint can take its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import CheckpointMismatch, CorruptCheckpoint, load, save
from megatron.checkpoint.manifest import Manifest
from tests.checkpoint.helpers import Layout, assert_holds, read_and_write_again, silent, small_state, write_known
from tests.support import run_ranks

KINDS = ("__0_0.distcp", ".metadata", "run.json", "progress.json", "manifest.json")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for iteration in (1, 2):
        save(tmp_path, iteration, small_state(float(iteration)), log=silent)
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
def test_damage_is_found_and_named(root: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = root / "iter_0000002" / name
    assert path.is_file()
    damage(path)
    into = {k: torch.zeros_like(t) for k, t in small_state().tensors.items()}
    with pytest.raises(CorruptCheckpoint, match=name.replace(".", r"\.")):
        load(root, into=into, verify=True, log=silent)
    assert not any(tensor.any() for tensor in into.values())
    said: list[str] = []
    loaded = load(root, into=into, verify=True, fallback=True, log=said.append)
    assert loaded is not None
    assert loaded.iteration == 1
    assert torch.equal(into["model.b.weight"], small_state(1.0).tensors["model.b.weight"])
    assert f"FALLING BACK to the older checkpoint {root / 'iter_0000001'}" in "".join(said)


@pytest.mark.parametrize(("name", "damage"), [(n, flip_bit) for n in KINDS[1:]] + [(KINDS[0], truncate)])
def test_all_but_a_flipped_bit_in_a_tensor_is_found_without_hashing(
    root: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(root / "iter_0000002" / name)
    with pytest.raises(CorruptCheckpoint):
        load(root, into=dict(small_state().tensors), log=silent)


def test_a_file_that_cannot_be_parsed_is_named_without_hashing(root: Path) -> None:
    path = root / "iter_0000002" / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptCheckpoint, match=r"__0_0\.distcp: contents have changed"):
        load(root, into=dict(small_state().tensors), log=silent)


def test_the_last_checkpoint_has_nothing_to_fall_back_to(root: Path) -> None:
    for iteration in (1, 2):
        truncate(root / f"iter_000000{iteration}" / "__0_0.distcp")
    with pytest.raises(CorruptCheckpoint, match="iter_0000001"):
        load(root, into=dict(small_state().tensors), fallback=True, log=silent)


def test_saving_goes_on_after_damage(root: Path) -> None:
    truncate(root / "iter_0000002" / "__0_0.distcp")
    save(root, 2, small_state(5.0), log=silent)
    assert_holds(root, {5.0})


@pytest.mark.slow
def test_damage_is_found_by_all_ranks_together(tmp_path: Path) -> None:
    write_known(str(tmp_path / "whole"), Layout())
    flip_bit(tmp_path / "whole" / "iter_0000007" / "__0_0.distcp")
    answers = run_ranks(2, _load_damaged, str(tmp_path / "whole"))
    assert len(set(answers)) == 1
    assert "__0_0.distcp: contents have changed" in answers[0]


def _load_damaged(root: str) -> str:
    with pytest.raises(CorruptCheckpoint) as caught:
        read_and_write_again(root, f"{root}-again", Layout(dp=2))
    return str(caught.value)


def test_files_of_an_engine_as_earlier_versions_wrote_them(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000005"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(
        Manifest(payload="directory", iteration=5, torch="2.13", files={}, tensors={}).to_bytes()
    )
    with pytest.raises(CheckpointMismatch, match="holds files of DeepSpeed's own, as earlier versions wrote them"):
        load(tmp_path, into={}, log=silent)
