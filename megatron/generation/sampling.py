"""How the next token is chosen from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class SamplingError(ValueError):
    """Settings from which no token can be chosen."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice.

    Attributes:
        temperature: logits are divided by it; 0 = always the most likely token (greedy).
        top_k: only the k most likely tokens; 0 = all.
        top_p: only the smallest set of most likely tokens whose probabilities sum to at least this; 1 = all
            (nucleus sampling, arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise SamplingError(f"--temperature is {self.temperature}; it must be at least 0")
        if self.top_k < 0:
            raise SamplingError(f"--top-k is {self.top_k}; it must be at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise SamplingError(f"--top-p is {self.top_p}; it must be more than 0 and at most 1")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of every sequence.

    Args:
        logits: [b, v] of the real vocabulary.
        sampling: the settings.
        generator: source of randomness; unused when greedy.

    Returns:
        [b] int64.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    ordered, tokens = scaled.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    if sampling.top_k:
        dropped[:, sampling.top_k :] = True
    kept = probabilities.masked_fill(dropped, 0.0)
    return tokens.gather(-1, torch.multinomial(kept, 1, generator=generator))[:, 0]
