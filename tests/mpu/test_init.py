"""Initial weights: right statistics, and the same numbers whichever part is drawn."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.mpu.init import BLOCK_ROWS, Distribution, block_seed, draw, xavier_uniform
from megatron.mpu.sharding import local_slice

NORMAL = Distribution(kind="normal", scale=0.02)
ROWS, COLUMNS = 2 * BLOCK_ROWS + 136, 48


def _whole(name: str, shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return draw(name, shape, tuple(slice(0, length) for length in shape), NORMAL, seed=seed)


@pytest.mark.parametrize("name", ["layers.0.mlp.up.weight", "layers.0.mlp.down.weight", "layers.0.mlp_norm.weight"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_parts_are_cut_from_the_same_whole(name: str, tp: int) -> None:
    whole = _whole(name, (ROWS, COLUMNS))
    for rank in range(tp):
        index = local_slice(name, (ROWS, COLUMNS), rank, tp)
        assert torch.equal(draw(name, (ROWS, COLUMNS), index, NORMAL, seed=1), whole[index])


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (BLOCK_ROWS - 1, BLOCK_ROWS + 1), (BLOCK_ROWS, ROWS), (7, ROWS - 3), (5, 5)]
)
def test_any_rows_may_be_drawn_alone(start: int, stop: int) -> None:
    whole = _whole("head.weight", (ROWS, COLUMNS))
    part = draw("head.weight", (ROWS, COLUMNS), (slice(start, stop), slice(3, 9)), NORMAL, seed=1)
    assert torch.equal(part, whole[start:stop, 3:9])


def test_more_rows_leave_the_first_ones_alone() -> None:
    """The number of padding rows of the vocabulary depends on the layout."""
    few, many = _whole("head.weight", (1000, 24)), _whole("head.weight", (1100, 24))
    assert torch.equal(few, many[:1000])


def test_names_seeds_and_blocks_draw_different_numbers() -> None:
    tensors = [
        _whole("layers.0.mlp.up.weight", (BLOCK_ROWS, 24)),
        _whole("layers.1.mlp.up.weight", (BLOCK_ROWS, 24)),
        _whole("layers.0.mlp.up.weight", (BLOCK_ROWS, 24), seed=2),
        _whole("layers.0.mlp.up.weight", (2 * BLOCK_ROWS, 24))[BLOCK_ROWS:],
    ]
    for at, one in enumerate(tensors):
        for other in tensors[at + 1 :]:
            correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
            assert abs(correlation) < 5 / math.sqrt(one.numel())  # five standard deviations of pure chance


def test_a_recorded_seed_stays_what_it_is() -> None:
    """Changing the derivation would change every run's initial weights."""
    assert block_seed(1234, "layers.0.mlp.up.weight", 3) == 11531752803604324394


def test_normal_deviates_have_the_asked_moments() -> None:
    sample = _whole("layers.0.mlp.up.weight", (4 * BLOCK_ROWS, 256)).flatten() / NORMAL.scale
    bound = 5 / math.sqrt(sample.numel())  # five standard errors
    assert abs(sample.mean()) < bound
    assert abs(sample.std() - 1) < bound
    assert abs((sample**3).mean()) < math.sqrt(15) * bound
    assert abs((sample**4).mean() - 3) < math.sqrt(96) * bound


def test_xavier_fills_its_interval_evenly() -> None:
    distribution = xavier_uniform(600, 256)
    assert distribution.scale == pytest.approx(math.sqrt(6 / 856))
    sample = draw("w", (600, 256), (slice(0, 600), slice(0, 256)), distribution, seed=3).flatten() / distribution.scale
    bound = 5 / math.sqrt(sample.numel())
    assert sample.abs().max() <= 1.0
    assert abs(sample.mean()) < bound
    assert abs((sample**2).mean() - 1 / 3) < bound


def test_constants_are_constant() -> None:
    part = draw("final_norm.weight", (9,), (slice(2, 5),), Distribution(kind="constant", scale=1.0), seed=3)
    assert part.tolist() == [1.0, 1.0, 1.0]
