"""Reading blends and splits from the command line."""

from __future__ import annotations

import pytest

from megatron.data.blend import dataset_sizes, parse_blend, parse_split, split_range
from megatron.data.errors import DataError


def test_blends_with_and_without_weights():
    assert parse_blend(["x"]).prefixes == ("x",)
    assert parse_blend(["x"]).weights is None
    assert parse_blend(["x", "y"]).weights is None
    weighted = parse_blend(["30", "x", "10", " y "])
    assert weighted.prefixes == ("x", "y")
    assert weighted.weights == (0.75, 0.25)


@pytest.mark.parametrize("entries", [[], ["1", "x", "y"], ["1", "x", "y", "z"], ["0", "x"], ["-1", "x"], ["inf", "x"]])
def test_wrong_blends_are_refused(entries):
    with pytest.raises(DataError, match="--data-path"):
        parse_blend(entries)


@pytest.mark.parametrize("split", ["969,30,1", "969, 30, 1", "969/30/1", "0.969,0.03,0.001"])
def test_splits_are_proportions(split):
    ranges = [split_range(part, 100) for part in parse_split(split)]
    assert ranges == [(0, 97), (97, 100), (100, 100)]


def test_missing_parts_are_empty():
    assert parse_split("100") == ((0.0, 1.0), None, None)
    assert parse_split("0,1,0") == (None, (0.0, 1.0), None)


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "1,-1", "0,0", "nan", "1,,2"])
def test_wrong_splits_are_refused(split):
    with pytest.raises(DataError, match="--split"):
        parse_split(split)


def test_sizes_have_a_surplus():
    assert dataset_sizes([0.3, 0.7], 1000, 0.005) == ([300, 700], [302, 704])
