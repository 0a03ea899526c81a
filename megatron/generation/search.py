"""What becomes of the texts after each reading: which go on, and with which token.

A search is a plain state machine on the host. It is given the logits of every text that it goes on with, and every rank
runs it on the same numbers, so that ranks need not tell each other what they decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron.generation.sampling import Sampling, choose, penalised

Reason = Literal["eos", "stop", "length"]
Emit = Callable[[int, int], None]


@dataclass(frozen=True)
class Next:
    """How the texts go on.

    Attributes:
        parents: for each text that goes on, which of those whose logits were given it continues; none: all are done.
        tokens: what it continues with.
    """

    parents: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Continuation:
    """What was written.

    Attributes:
        tokens: without the prompt and without the token that ended it.
        reason: why it ended: a token that ends texts, a stop word, or the number of tokens.
    """

    tokens: list[int]
    reason: Reason


class Search(Protocol):
    """Decides how texts go on."""

    def advance(self, logits: Tensor) -> Next:
        """The next tokens, for logits [b, v] float32 of what the last answer named (at first the prompts)."""
        ...

    def results(self) -> list[Continuation]:
        """One continuation for each prompt, when all are done."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What ends a text.

    Attributes:
        tokens: any of these, which is then not part of it.
        length: so many tokens.
        stopped: whether a stop word is in what these tokens spell.
    """

    tokens: frozenset[int]
    length: int
    stopped: Callable[[Sequence[int]], bool] = lambda tokens: False

    def reason(self, written: Sequence[int]) -> Reason | None:
        """Why a text ends after these tokens; None: it goes on."""
        if written[-1] in self.tokens:
            return "eos"
        if self.stopped(written):
            return "stop"
        return "length" if len(written) >= self.length else None

    def finished(self, written: Sequence[int], reason: Reason) -> Continuation:
        """The continuation that ended with these tokens."""
        return Continuation(list(written[:-1] if reason == "eos" else written), reason)


@dataclass
class _Text:
    """One prompt and what was written."""

    prompt: Sequence[int]
    ending: Ending
    generator: torch.Generator
    written: list[int] = field(default_factory=list)
    reason: Reason | None = None


class Sampled:
    """Draws one token at a time for each prompt (or takes the most likely one).

    Args:
        prompts: token ids of each.
        endings: of each.
        sampling: how tokens are chosen.
        seeds: of each; the choice does not depend on the other prompts.
        emit: told number of the prompt and new token, but not of one that ends the text.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        endings: Sequence[Ending],
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        emit: Emit = lambda prompt, token: None,
    ) -> None:
        self._texts = [
            _Text(prompt, ending, torch.Generator().manual_seed(seed))
            for prompt, ending, seed in zip(prompts, endings, seeds, strict=True)
        ]
        self._going = list(range(len(prompts)))
        self._sampling, self._emit = sampling, emit

    def advance(self, logits: Tensor) -> Next:
        """See `Search`."""
        texts = [self._texts[number] for number in self._going]
        so_far = [[*text.prompt, *text.written] for text in texts]
        likely = penalised(logits, so_far, self._sampling.repetition_penalty)
        tokens = choose(likely, self._sampling, [text.generator for text in texts])
        for number, text, token in zip(self._going, texts, tokens, strict=True):
            text.written.append(token)
            text.reason = text.ending.reason(text.written)
            if text.reason != "eos":
                self._emit(number, token)
        parents = [row for row, text in enumerate(texts) if text.reason is None]
        self._going = [self._going[row] for row in parents]
        return Next(parents, [tokens[row] for row in parents])

    def results(self) -> list[Continuation]:
        """See `Search`."""
        return [text.ending.finished(text.written, text.reason) for text in self._texts if text.reason is not None]
