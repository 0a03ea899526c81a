"""Beam search: the most likely text instead of the most likely token.

The rules are those of Hugging Face's `generate` with `num_beams` and its other settings left alone, so that both find
the same text. Of each prompt the `width` most likely unfinished texts (beams) are continued; finished ones are kept by
the mean log-probability of their tokens; it ends when no unfinished text is as good as the worst of `width` finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.generation.sampling import SamplingError, penalised
from megatron.generation.search import Continuation, Ending, Next


@dataclass(frozen=True)
class _Beam:
    """A text and the sum of the log-probabilities of its tokens."""

    score: float
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """Settings of the search.

    Attributes:
        width: unfinished texts per prompt.
        length_penalty: log-probabilities are divided by the number of tokens to this power: 0 favours short texts.
        repetition_penalty: see `Sampling`.
    """

    width: int
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise SamplingError(f"--num-beams is {self.width}; it must be at least 1")


class _PromptBeams:
    """The search for one prompt."""

    def __init__(self, prompt: Sequence[int], ending: Ending, settings: BeamSettings) -> None:
        self._prompt, self._ending, self._settings = prompt, ending, settings
        self.going = [_Beam(0.0)]
        self._finished: list[tuple[float, Continuation]] = []

    def advance(self, logits: Tensor) -> Next:
        """How the unfinished texts go on, for their logits [beams, v]."""
        candidates = self._candidates(logits)
        ends = [self._ending.reason(beam.tokens) for _, beam in candidates]
        for (_, beam), reason in list(zip(candidates, ends, strict=True))[: self._settings.width]:
            if reason is not None:
                self._finished.append((self._mean(beam), self._ending.finished(beam.tokens, reason)))
        self._finished = sorted(self._finished, key=lambda entry: -entry[0])[: self._settings.width]
        kept = [candidate for candidate, reason in zip(candidates, ends, strict=True) if reason is None]
        kept = kept[: self._settings.width]
        if not kept or not self._may_improve(kept[0][1]):
            kept = []
        self.going = [beam for _, beam in kept]
        return Next([parent for parent, _ in kept], [beam.tokens[-1] for beam in self.going])

    def _candidates(self, logits: Tensor) -> list[tuple[int, _Beam]]:
        """The best continuations with their parents: enough of them, should all tokens that end texts be among them."""
        texts = [[*self._prompt, *beam.tokens] for beam in self.going]
        likely = penalised(logits.float().log_softmax(-1), texts, self._settings.repetition_penalty)
        scores = (likely + torch.tensor([[beam.score] for beam in self.going])).flatten()
        count = max(2, 1 + len(self._ending.tokens)) * self._settings.width
        best = scores.topk(min(count, len(scores)))
        found = []
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            parent, token = divmod(index, logits.shape[1])
            found.append((parent, _Beam(score, (*self.going[parent].tokens, token))))
        return found

    def _mean(self, beam: _Beam) -> float:
        return beam.score / float(len(beam.tokens) ** self._settings.length_penalty)

    def _may_improve(self, best: _Beam) -> bool:
        """Whether an unfinished text may still become better than a finished one."""
        return len(self._finished) < self._settings.width or self._mean(best) > self._finished[-1][0]

    def result(self) -> Continuation:
        """The best finished text."""
        return self._finished[0][1]


class BeamSearch:
    """Searches for all prompts at a time.

    Args:
        prompts: token ids of each.
        endings: of each.
        settings: of the search.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], endings: Sequence[Ending], *, settings: BeamSettings
    ) -> None:
        self._searches = [_PromptBeams(*pair, settings) for pair in zip(prompts, endings, strict=True)]

    def advance(self, logits: Tensor) -> Next:
        """See `search.Search`."""
        parents: list[int] = []
        tokens: list[int] = []
        start = 0
        for search in self._searches:
            rows = len(search.going)
            if rows:
                found = search.advance(logits[start : start + rows])
                parents += [start + parent for parent in found.parents]
                tokens += found.tokens
            start += rows
        return Next(parents, tokens)

    def results(self) -> list[Continuation]:
        """See `search.Search`."""
        return [search.result() for search in self._searches]
