"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Sequence
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
        top_p: of these, only the smallest set of most likely tokens whose probabilities sum to at least this; 1 = all
            (nucleus sampling, arXiv:1904.09751).
        repetition_penalty: logits of tokens that the text has already are divided by it if they are positive, else
            multiplied (arXiv:1909.05858, section 4.1); 1 = off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise SamplingError(f"--temperature is {self.temperature}; it must be at least 0")
        if self.top_k < 0:
            raise SamplingError(f"--top-k is {self.top_k}; it must be at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise SamplingError(f"--top-p is {self.top_p}; it must be more than 0 and at most 1")
        if self.repetition_penalty <= 0.0:
            raise SamplingError(f"--repetition-penalty is {self.repetition_penalty}; it must be more than 0")


def penalised(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits with those of repeated tokens lowered, see `Sampling.repetition_penalty`.

    Args:
        logits: [b, v] logits, or log-probabilities.
        texts: the tokens of each text so far.
        penalty: 1 = none.

    Returns:
        [b, v].
    """
    if penalty == 1.0:
        return logits
    result = logits.clone()
    for row, text in zip(result, texts, strict=True):
        tokens = torch.tensor(sorted(set(text)), device=logits.device)
        known = row[tokens]
        row[tokens] = torch.where(known < 0, known * penalty, known / penalty)
    return result


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """With which probability each token is to be drawn.

    Args:
        logits: [b, v] of the real vocabulary.
        sampling: the settings; the temperature is not 0.

    Returns:
        [b, v] float32; rows sum to 1.
    """
    ordered, tokens = (logits.float() / sampling.temperature).sort(-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = float("-inf")
    likely = ordered.softmax(-1)
    before = likely.cumsum(-1) - likely
    kept = likely.masked_fill(before >= sampling.top_p, 0.0)
    return torch.zeros_like(likely).scatter_(-1, tokens, kept / kept.sum(-1, keepdim=True))


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The next token of every text.

    Args:
        logits: [b, v] of the real vocabulary.
        sampling: the settings.
        generators: source of randomness of each text, so that it does not depend on the others; unused when greedy.
    """
    if sampling.temperature == 0.0:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    rows = probabilities(logits, sampling)
    return [
        int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(rows, generators, strict=True)
    ]
