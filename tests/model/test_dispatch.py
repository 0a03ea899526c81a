"""Which choices go to experts, against the rules written out by hand; capacities and bins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron.model.capacity import capacity, exponential_bins, given_bins, rounded
from megatron.model.dispatch import Dispatch, count_choices, dispatch_all, dispatch_limited

TOKENS, TOPK, EXPERTS, HIDDEN = 11, 2, 4, 3


def _choices(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    weights, experts = scores.topk(TOPK)
    return experts, weights


def _by_hand(experts: Tensor, weights: Tensor, x: Tensor, limit: int, policy: str) -> Tensor:
    """Expert e multiplies by e + 1 and takes the `limit` best or first choices."""
    result = torch.zeros_like(x)
    for expert in range(EXPERTS):
        wanting = [(t, j) for t in range(TOKENS) for j in range(TOPK) if experts[t, j] == expert]
        if policy == "probs":
            wanting.sort(key=lambda choice: -weights[choice].item())
        for t, j in wanting[:limit]:
            result[t] += weights[t, j] * (expert + 1) * x[t]
    return result


def _through(dispatch: Dispatch, x: Tensor, weights: Tensor) -> Tensor:
    rows = dispatch.gather(x, TOPK)
    factors = torch.arange(1.0, EXPERTS + 1, dtype=x.dtype).repeat_interleave(dispatch.counts)
    return dispatch.combine(rows * factors[:, None], weights)


@pytest.mark.parametrize("seed", range(3))
def test_choices_reach_their_experts(seed: int) -> None:
    experts, weights = _choices(seed)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    counts = count_choices(experts, EXPERTS)
    torch.testing.assert_close(
        _through(dispatch_all(experts, counts), x, weights), _by_hand(experts, weights, x, TOKENS, "probs")
    )
    for limit, policy, pad in itertools.product((1, 3, TOKENS), ("probs", "position"), (False, True)):
        dispatch = dispatch_limited(experts, counts, weights, limit=limit, policy=policy, pad=pad)  # type: ignore[arg-type]
        if pad:
            assert dispatch.counts.tolist() == [limit] * EXPERTS
        torch.testing.assert_close(_through(dispatch, x, weights), _by_hand(experts, weights, x, limit, policy))


def test_capacity_is_an_equal_share_within_limits() -> None:
    assert capacity(64, 8, 2, 1.0, 4) == 16
    assert capacity(64, 8, 2, 1.01, 4) == 17
    assert capacity(8, 8, 1, 1.0, 4) == 4
    assert capacity(2, 8, 1, 1.0, 4) == 2  # no more than there are


def test_bins_grow_from_an_equal_share_to_all() -> None:
    assert exponential_bins(1024, 8, 2, 3, 2.0, 1) == (366, 586, 1024)
    assert exponential_bins(1024, 8, 2, 3, 2.0, 64) == (384, 640, 1024)
    assert exponential_bins(1000, 8, 2, 1, 1.5, 64) == (1024,)
    with pytest.raises(ValueError, match="--moe-num-capacity-bins 5: 64 tokens"):
        exponential_bins(64, 8, 2, 5, 2.0, 32)
    assert [rounded(tokens, (8, 16)) for tokens in (3, 8, 9, 17)] == [8, 8, 16, 17]


def test_given_bins_are_those_for_the_number_of_experts() -> None:
    assert given_bins(("2,100,200", "4,300,600"), 4) == (300, 600)
    assert given_bins(("2,100,200",), 8) is None
    for word in ("8", "8,5,4", "8,x", "8,0,4"):
        with pytest.raises(ValueError, match=f"--moe-capacity-bins {word}"):
            given_bins((word,), 8)
