"""The C++ index builders against plain Python twins, and their argument checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron.data
from megatron.data.native import index_builder

native = index_builder()


def plain_sample_idx(lengths, documents, seq_length, drop_last, extra):
    """Lay the documents end to end; sample k starts at token k * seq_length."""
    owner = [(place, offset) for place, doc in enumerate(documents) for offset in range(lengths[doc])]
    total = len(owner) - extra
    count = total // seq_length if drop_last else -(-total // seq_length)
    starts = [min(k * seq_length, total) for k in range(count + 1)]
    return owner, starts


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda x: sum(x) >= 2),
    seq_length=st.integers(1, 15),
    epochs=st.integers(1, 3),
    drop_last=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 10),
)
def test_sample_idx_reads_consecutive_windows(lengths, seq_length, epochs, drop_last, wide, seed):
    documents = np.tile(np.arange(len(lengths), dtype=np.int32), epochs)
    np.random.RandomState(seed).shuffle(documents)
    build = native.build_sample_idx_int64 if wide else native.build_sample_idx_int32
    rows = build(np.array(lengths, np.int32), documents, seq_length, epochs, sum(lengths), drop_last)
    owner, starts = plain_sample_idx(lengths, documents, seq_length, drop_last, 1)
    assert rows.dtype == (np.int64 if wide else np.int32)
    assert len(rows) == len(starts)
    # Row k points at the token where sample k starts; the first row is (0, 0) even if document 0 is empty.
    assert rows[0].tolist() == [0, 0]
    assert [tuple(row) for row in rows[1:].tolist()] == [owner[start] for start in starts[1:]]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 3000),
    skip=st.integers(0, 1500),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["i4", "u4", "i8"]),
)
def test_shuffle_is_numpys(size, skip, seed, dtype):
    theirs, ours = np.random.RandomState(seed), np.random.RandomState(seed)
    for state in (theirs, ours):
        state.randint(0, 2**31, skip)
    expected, values = np.arange(size, dtype=dtype), np.arange(size, dtype=dtype)
    theirs.shuffle(expected)
    current = ours.get_state(legacy=False)
    current["state"]["pos"] = native.shuffle(values, current["state"]["key"], current["state"]["pos"])
    ours.set_state(current)
    assert (values == expected).all()
    assert theirs.randint(0, 2**31) == ours.randint(0, 2**31)


def plain_blend(weights, size, sizes=None):
    counts, order = [0] * len(weights), []
    for position in range(size):
        errors = [
            w * max(position, 1.0) - c if sizes is None or c < sizes[d] else -np.inf
            for d, (w, c) in enumerate(zip(weights, counts, strict=True))
        ]
        chosen = int(np.argmax(errors))
        order.append((chosen, counts[chosen]))
        counts[chosen] += 1
    return order


@settings(max_examples=60, deadline=None)
@given(raw=st.lists(st.integers(1, 9), min_size=1, max_size=6), size=st.integers(0, 80))
def test_blend_is_the_greedy_one(raw, size):
    weights = np.array(raw, np.float64) / sum(raw)
    numbers, samples = native.build_blending_indices(weights, size)
    assert list(zip(numbers.tolist(), samples.tolist(), strict=True)) == plain_blend(weights, size)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_exhaustive_blend_takes_every_sample_once(sizes):
    numbers, samples = native.build_exhaustive_blending_indices(np.array(sizes, np.int64))
    order = list(zip(numbers.tolist(), samples.tolist(), strict=True))
    assert order == plain_blend([size / sum(sizes) for size in sizes], sum(sizes), sizes)
    assert sorted(order) == [(d, i) for d, size in enumerate(sizes) for i in range(size)]


I32 = np.array([5, 5], np.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((I32.astype(np.int64), I32 * 0, 4, 1, 10), "sizes must be int32"),
        ((I32[:, None], I32 * 0, 4, 1, 10), "one dimension"),
        ((np.zeros(8, np.int32)[::2], I32 * 0, 4, 1, 10), "contiguous"),
        ((np.frombuffer(bytes(10), np.int32, 2, 1), I32 * 0, 4, 1, 10), "aligned"),
        ((I32, np.array([0, 2], np.int32), 4, 1, 10), "outside of sizes"),
        ((I32, np.array([0, -1], np.int32), 4, 1, 10), "outside of sizes"),
        ((np.array([5, -5], np.int32), np.array([0, 1], np.int32), 4, 1, 10), "negative length"),
        ((I32, np.array([0, 1], np.int32), 4, 1, 100), "end before the last sample"),
        ((I32, np.array([0, 1], np.int32), 0, 1, 10), "seq_length"),
        ((I32, np.array([0, 1], np.int32), 4, 0, 10), "num_epochs"),
        ((I32, np.array([0, 1], np.int32), 4, 1, 0), "tokens_per_epoch"),
        ((I32, np.array([0, 1], np.int32), 4, 2**40, 2**40), "64 bits"),
    ],
)
def test_wrong_arguments_of_the_walk_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        native.build_sample_idx_int32(*arguments)


def test_wrong_arguments_of_the_blends_are_refused():
    with pytest.raises(ValueError, match="must be positive and finite"):
        native.build_blending_indices(np.array([1.5, -0.5]), 3)
    with pytest.raises(ValueError, match="sum to 1"):
        native.build_blending_indices(np.array([0.5, 0.6]), 3)
    with pytest.raises(ValueError, match="float64"):
        native.build_blending_indices(np.array([1], np.float32), 3)
    with pytest.raises(ValueError, match="1 to 32766"):
        native.build_blending_indices(np.empty(0), 3)
    with pytest.raises(ValueError, match="not be negative"):
        native.build_blending_indices(np.array([1.0]), -1)
    with pytest.raises(ValueError, match="size 1 must be positive"):
        native.build_exhaustive_blending_indices(np.array([1, 0]))


def test_a_missing_extension_says_what_to_do(tmp_path):
    # A copy of the package without the compiled file: what a checkout is before it is installed.
    (tmp_path / "megatron" / "data").mkdir(parents=True)
    for name in ("__init__.py", "native.py"):
        (tmp_path / "megatron" / "data" / name).write_text((Path(megatron.data.__file__).parent / name).read_text())
    (tmp_path / "megatron" / "__init__.py").write_text("")
    run = subprocess.run(
        [sys.executable, "-c", "from megatron.data.native import index_builder; index_builder()"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "pip install -e ." in run.stderr
