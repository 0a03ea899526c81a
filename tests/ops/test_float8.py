"""8-bit numbers against their definition bit by bit, scales against exact powers, products against exact sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron.accelerators.base import FLOAT8
from megatron.ops import float8, reference, scaled_mm

E4M3, E5M2 = (float8.Format(dtype, FLOAT8[dtype]) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
GAUDI = float8.Format(torch.float8_e4m3fn, 240.0)
EXACT = 1e-14  # float64 sums
ROUNDING = 1e-6  # relative to the largest element: float32 sums of 32 products, each of which is exact


def numbers(exponent_bits: int, largest: float) -> np.ndarray:
    """All numbers of a format of 8 bits up to `largest`, made from sign, exponent and mantissa; float64, in order."""
    mantissa_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            scale = 2.0 ** (max(exponent, 1) - bias)
            values.append(scale * (fraction + (1.0 if exponent else 0.0)))
    positive = [value for value in values if value <= largest]
    return np.array(sorted({-value for value in positive} | set(positive)))


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Rounded to the grid, ties to the number with an even last bit, which is every other one from zero."""
    x = np.clip(x, grid[0], grid[-1])
    above = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    even = (above - len(grid) // 2) % 2 == 0
    take_high = (high - x < x - low) | ((high - x == x - low) & even)
    return np.where(take_high, high, low)


GRIDS = {"E4M3": (E4M3, numbers(4, 448.0)), "E5M2": (E5M2, numbers(5, 57344.0)), "Gaudi 2": (GAUDI, numbers(4, 240.0))}


@pytest.mark.parametrize("name", GRIDS)
def test_cast_is_the_nearest_number_of_the_format(name: str) -> None:
    to, grid = GRIDS[name]
    between = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, grid * 1.01, [1e9, -1e9]])  # numbers and all ties
    for scale in (1.0, 2.0**-3, 2.0**9):
        cast = float8.cast(torch.tensor(between / scale), torch.tensor(scale), to)
        assert cast.dtype == to.dtype
        np.testing.assert_array_equal(cast.double().numpy(), nearest(between.astype(np.float32), grid))
    assert float8.cast(torch.tensor([math.nan]), torch.tensor(1.0), to).isnan().all()


def test_scales_are_the_largest_powers_that_do_not_overflow() -> None:
    amax = torch.logspace(-30, 30, 4001, dtype=torch.float64).float()
    for largest in (240.0, 448.0, 57344.0):
        for margin in (0, 3):
            exponents = [math.frexp(largest / value)[1] - 1 - margin for value in amax.tolist()]
            expected = torch.tensor([2.0**exponent for exponent in exponents])
            assert torch.equal(float8.scale_of(amax, largest, margin), expected)
    powers = 2.0 ** torch.arange(-20.0, 20.0)
    assert torch.equal(float8.scale_of(448.0 / powers, 448.0, 0), powers)
    assert float8.scale_of(torch.zeros(1), 448.0, 2) == 1.0


def expected_products(
    x: np.ndarray, w: np.ndarray, g: np.ndarray, scales: tuple[float, float, float], name: str, wgrad: bool
) -> list[np.ndarray]:
    forward, backward = {"hybrid": ("E4M3", "E5M2"), "e4m3": ("E4M3",) * 2, "e5m2": ("E5M2",) * 2}[name]
    grids = (GRIDS[forward][1], GRIDS[forward][1], GRIDS[backward][1])
    x8, w8, g8 = (nearest(v * s, grid) / s for v, s, grid in zip((x, w, g), scales, grids, strict=True))
    return [x8 @ w8.T, g8 @ w8, g8.T @ x8 if wgrad else g.T @ x]


_CASES = (
    *((reference.make_linear, name, torch.float64) for name in ("hybrid", "e4m3", "e5m2")),
    *((make, n, torch.float32) for make in (reference.make_linear, scaled_mm.make) for n in ("hybrid", "e4m3")),
)


@pytest.mark.parametrize("wgrad", [True, False])
@pytest.mark.parametrize(
    ("make", "name", "dtype"), _CASES, ids=lambda value: str(getattr(value, "__module__", value)).rpartition(".")[2]
)
def test_products_are_those_of_the_rounded_numbers(make, name: str, dtype: torch.dtype, wgrad: bool) -> None:
    generator = np.random.default_rng(0)
    x, w, g = (generator.standard_normal(s).astype(np.float32).astype(float) for s in ((16, 32), (48, 32), (16, 48)))
    g *= 1e-6
    scales = (32.0, 64.0, 2.0**22)  # some of x saturate
    tensors = [torch.tensor(scale) for scale in scales]
    a, b = (torch.tensor(v, dtype=dtype).requires_grad_() for v in (x, w))
    product = make(32, 48, float8.formats(name, FLOAT8, weight_gradient=wgrad))
    seen: list[torch.Tensor] = []
    y = product(a.view(4, 4, 32), b, tensors[0], tensors[1], lambda gradient: (seen.append(gradient), tensors[2])[1])
    assert y.shape == (4, 4, 48) and y.dtype == dtype
    y.backward(torch.tensor(g, dtype=dtype).view(4, 4, 48))
    assert len(seen) == 1 and seen[0].shape == (4, 4, 48)
    found = [y.detach().view(16, 48), a.grad, b.grad]
    for mine, true in zip(found, expected_products(x, w, g, scales, name, wgrad), strict=True):
        error = np.abs(mine.double().numpy() - true).max() / np.abs(true).max()
        assert error <= (EXACT if dtype == torch.float64 else ROUNDING)


@pytest.mark.parametrize("make", [reference.make_linear, scaled_mm.make], ids=["reference", "scaled_mm"])
def test_a_weight_that_is_kept_gives_the_same_products_and_is_not_read_again(make) -> None:
    x, weight = torch.randn(16, 32).requires_grad_(), torch.randn(48, 32).requires_grad_()
    two = torch.tensor(2.0)
    product = make(32, 48, float8.formats("hybrid", FLOAT8, weight_gradient=True))

    def results(read: torch.Tensor, new: bool | None) -> tuple[torch.Tensor, ...]:
        y = product(x, read, two, two, lambda gradient: two, new_weight=new)
        return y, *torch.autograd.grad(y, (x, read), y.detach())

    plain, first = results(weight, None), results(weight, True)
    later = results(torch.full_like(weight, torch.nan).requires_grad_(), False)
    for one, same, kept in zip(plain, first, later, strict=True):
        assert torch.equal(one, same) and torch.equal(one, kept)


def test_refusals() -> None:
    hybrid = float8.formats("hybrid", FLOAT8, weight_gradient=True)
    with pytest.raises(ValueError, match="24 input features per tensor-parallel rank; 8-bit products take multiples"):
        reference.make_linear(24, 32, hybrid)
    product = reference.make_linear(32, 48, hybrid)
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"weight \[48, 32\], not \[16, 32\], \[32, 32\]"):
        product(torch.zeros(16, 32), torch.zeros(32, 32), one, one, lambda g: one)
    with pytest.raises(ValueError, match="e5m2: this device multiplies E5M2 with E4M3 only"):
        scaled_mm.make(32, 48, float8.formats("e5m2", FLOAT8, weight_gradient=True))
    with pytest.raises(ValueError, match="8 tokens; 8-bit products take multiples of 16"):
        scaled_mm.make(32, 48, hybrid)(torch.zeros(8, 32), torch.zeros(48, 32), one, one, lambda g: one)
