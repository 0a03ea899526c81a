"""How many tokens an expert takes: pure arithmetic."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence


def capacity(tokens: int, experts: int, topk: int, factor: float, minimum: int) -> int:
    """Tokens that an expert takes of the `tokens` of a micro-batch: an equal share times `factor`.

    Megatron-LM's and DeepSpeed's rule (Fedus et al. 2021): ceil(tokens * topk / experts * factor), at least `minimum`,
    and never more than there are.
    """
    return min(tokens, max(math.ceil(tokens * topk / experts * factor), minimum))


def exponential_bins(
    tokens: int, experts: int, topk: int, count: int, base: float, alignment: int
) -> tuple[int, ...]:
    """Numbers to which the tokens of an expert are rounded up, so that few shapes occur.

    They divide the way from an equal share of the tokens to all of them, each step `base` times as long as the one
    before, and are multiples of `alignment`: the rule of Intel's DeepSpeed for Gaudi, which compiles every new shape.

    Args:
        tokens: of a micro-batch on one rank.
        experts, topk: of the model.
        count: how many numbers.
        base: ratio of neighbouring steps.
        alignment: what they are multiples of.

    Raises:
        ValueError: the numbers are not distinct.
    """
    lowest = min(tokens, math.ceil(topk * tokens / experts))
    widths = [base**at for at in range(count)]
    edges = (lowest + (tokens - lowest) * reached / sum(widths) for reached in itertools.accumulate(widths))
    # Rounded before it is rounded up: sums of fractions end a little above or below the whole number they stand for.
    bins = tuple(math.ceil(round(edge / alignment, 6)) * alignment for edge in edges)
    if len(set(bins)) < count:
        raise ValueError(
            f"--moe-num-capacity-bins {count}: {tokens} tokens per micro-batch and rank give no {count} different "
            f"multiples of --moe-capacity-bins-alignment {alignment} from {lowest} on; lower one of them"
        )
    return bins


def given_bins(words: Sequence[str], experts: int) -> tuple[int, ...] | None:
    """The bins that words such as "8,100,200,300" give for a number of experts, which comes first; None if none does.

    Raises:
        ValueError: a word that cannot be read, or whose numbers do not ascend.
    """
    found = None
    for word in words:
        try:
            first, *bins = (int(number) for number in word.split(","))
        except ValueError:
            bins = []
        if not bins or sorted(set(bins)) != bins or bins[0] < 1:
            raise ValueError(f"--moe-capacity-bins {word}: must be the number of experts, then ascending numbers")
        found = tuple(bins) if first == experts else found
    return found


def rounded(tokens: int, bins: Sequence[int]) -> int:
    """The smallest bin that holds so many tokens; the number itself where none does."""
    at = bisect.bisect_left(bins, tokens)
    return bins[at] if at < len(bins) else tokens
