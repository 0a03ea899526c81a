"""Rotary tables and ALiBi slopes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron.model.rotary import Positions, alibi_slopes, rotary_frequencies, rotary_tables
from megatron.mpu.groups import Group
from tests.model.helpers import FAMILIES

FLOAT32 = 1e-6
PLAIN = replace(FAMILIES["llama"], rope_scaling=None)


def test_frequencies_are_those_of_the_paper() -> None:
    frequencies = rotary_frequencies(replace(PLAIN, rope_theta=100.0))
    assert frequencies.tolist() == pytest.approx([100.0 ** (-2 * j / 8) for j in range(4)], rel=FLOAT32)


def test_only_a_part_of_the_channels_may_rotate() -> None:
    assert rotary_frequencies(replace(PLAIN, rope_percent=0.5)).shape == (2,)
    with pytest.raises(ValueError, match=r"--rotary-percent 0.4 of 8 channels per head rotates 3"):
        rotary_frequencies(replace(PLAIN, rope_percent=0.4))


def test_interpolation_divides_positions() -> None:
    cos, _ = rotary_tables(rotary_frequencies(PLAIN), 4, None, interleaved=False)
    slow, _ = rotary_tables(rotary_frequencies(replace(PLAIN, rope_interpolation=4.0)), 13, None, interleaved=False)
    assert torch.allclose(slow[::4], cos, atol=FLOAT32)


def test_tables_follow_given_positions() -> None:
    frequencies = rotary_frequencies(PLAIN)
    cos, sin = rotary_tables(frequencies, 5, None, interleaved=False)
    ids = torch.tensor([[0, 1, 2, 0, 1], [4, 3, 2, 1, 0]])
    own_cos, own_sin = rotary_tables(frequencies, 5, ids, interleaved=False)
    assert own_cos.shape == (5, 2, 1, 8)
    assert torch.equal(own_cos[:, 0], cos[[0, 1, 2, 0, 1], 0])
    assert torch.equal(own_sin[:, 1], sin.flip(0)[:, 0])


def test_interleaved_tables_pair_neighbouring_channels() -> None:
    cos, _ = rotary_tables(rotary_frequencies(PLAIN), 3, None, interleaved=True)
    assert torch.equal(cos[..., 0::2], cos[..., 1::2])


@pytest.mark.parametrize("heads", [1, 2, 8, 16])
def test_slopes_of_a_power_of_two_are_a_geometric_sequence(heads: int) -> None:
    assert alibi_slopes(heads) == pytest.approx([2 ** (-8 * (i + 1) / heads) for i in range(heads)])


def test_slopes_of_other_head_counts_follow_the_authors() -> None:
    root = math.sqrt(2)
    assert alibi_slopes(6) == pytest.approx([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    assert alibi_slopes(12)[8:] == pytest.approx([1 / root, 1 / root**3, 1 / root**5, 1 / root**7])


def test_ranks_take_the_slopes_of_their_heads() -> None:
    positions = Positions(FAMILIES["bloom"], Group((0, 1), rank=1, size=2, handle=None))
    slopes = positions.slopes(torch.device("cpu"))
    assert slopes is not None
    assert slopes.tolist() == pytest.approx(alibi_slopes(4)[2:])
    assert positions.rotary(4, None, torch.device("cpu")) is None
