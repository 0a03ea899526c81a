"""Parts of flat memory: boxes that cover a range, and checkpoints of ranks that hold ranges."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.checkpoint import Parts, Place, Stored, TrainingState, load, save
from megatron.checkpoint.parts import boxes
from megatron.mpu.sharding import local_slice, logical_shape
from tests.checkpoint.helpers import RUN, SHAPES, WORDS, expected, silent
from tests.support import run_ranks

ROWS = 104  # padded vocabulary
NAMES = [f"{kind}.{name}" for name in SHAPES for kind in ("model", "optimizer.exp_avg")]


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_are_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    elements = math.prod(shape)
    start = data.draw(st.integers(0, elements))
    stop = data.draw(st.integers(start, elements))
    numbers = torch.arange(elements).view(shape)
    found = []
    for box in boxes(start, stop, shape):
        part = numbers[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))]
        assert tuple(part.shape) == box.sizes
        found.append(part.reshape(-1))
    assert torch.equal(torch.cat(found) if found else numbers.reshape(-1)[:0], torch.arange(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def _whole_shape(name: str) -> tuple[int, ...]:
    shape = SHAPES[name.removeprefix("model.").removeprefix("optimizer.exp_avg.")]
    return (ROWS, *shape[1:]) if shape[0] == WORDS else shape


def _ranges(tp: int, dp: int) -> dict[str, Parts]:
    """This rank's range of every parameter: the flattened tensor-parallel part, in `dp` pieces of uneven lengths."""
    rank = int(os.environ.get("RANK", "0"))
    tensors: dict[str, Parts] = {}
    for name in NAMES:
        logical = name.removeprefix("model.").removeprefix("optimizer.exp_avg.")
        shape = _whole_shape(name)
        place = Place(shape, local_slice(logical, shape, rank % tp, tp))
        assert logical_shape(logical, place.sizes, tp) == shape
        elements = math.prod(place.sizes)
        cuts = [elements * i * i // (dp * dp) for i in range(dp + 1)]
        start, stop = cuts[rank // tp], cuts[rank // tp + 1]
        tensors[name] = Parts.of_range(torch.full((stop - start,), 7e7), start, place)
    return tensors


def _index(offsets: tuple[int, ...], box: torch.Tensor) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(offsets, box.shape, strict=True))


def _write(root: str, tp: int, dp: int) -> None:
    tensors = _ranges(tp, dp)
    for name, parts in tensors.items():
        whole = expected(name, parts.shape)
        if whole.shape[0] == ROWS:
            whole[WORDS:] = 1e9  # padding, which must never be seen again
        for offsets, box in parts.held.items():
            box.copy_(whole[_index(offsets, box)])
    save(root, 1, TrainingState(tensors=tensors, progress={}, run=RUN, vocab_size=WORDS), log=silent)


def _read(root: str, tp: int, dp: int) -> None:
    tensors = _ranges(tp, dp)
    load(root, into=tensors, vocab_size=WORDS, log=silent)
    for name, parts in tensors.items():
        whole = expected(name, parts.shape)
        for offsets, box in parts.held.items():
            assert torch.equal(box, whole[_index(offsets, box)]), name


def test_ranges_of_any_layout_are_read_in_any_other(tmp_path: Path) -> None:
    run_ranks(4, _write, str(tmp_path), 2, 2)
    plain: dict[str, Stored] = {name: torch.full(_whole_shape(name), 7e7) for name in NAMES}
    load(tmp_path, into=plain, vocab_size=WORDS, log=silent)
    for name, tensor in plain.items():
        assert isinstance(tensor, torch.Tensor)
        assert torch.equal(tensor, expected(name, tensor.shape)), name
    run_ranks(3, _read, str(tmp_path), 1, 3)


def test_a_range_is_a_view() -> None:
    flat = torch.zeros(7)
    parts = Parts.of_range(flat, 4, Place((4, 5), (slice(1, 4), slice(0, 5))))
    assert {tuple(offsets): tuple(box.shape) for offsets, box in parts.held.items()} == {
        (1, 4): (1, 1),
        (2, 0): (1, 5),
        (3, 0): (1, 1),
    }
    for number, box in enumerate(parts.held.values()):
        box.fill_(number + 1)
    assert flat.tolist() == [1, 2, 2, 2, 2, 2, 3]
    assert all(not box.any() for box in parts.map(torch.zeros_like).held.values())
    assert flat.all()


def test_ranges_that_overlap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="overlaps with another rank"):
        run_ranks(2, _write_overlapping, str(tmp_path))


def _write_overlapping(root: str) -> None:
    rank = int(os.environ["RANK"])
    part = Parts.of_range(torch.zeros(12), rank * 8, Place((4, 5), (slice(0, 4), slice(0, 5))))
    save(root, 1, TrainingState(tensors={"model.a": part}, progress={}, run=RUN), log=silent)
