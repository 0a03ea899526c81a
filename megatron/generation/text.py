"""Between text and tokens: prompts, what was written, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.config.architecture import Architecture
from megatron.generation.search import Ending
from megatron.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
"""What a tokenizer makes of the first bytes of a character whose others are still to come."""


class PromptError(ValueError):
    """A prompt that the model cannot continue."""


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], arch: Architecture) -> list[list[int]]:
    """Token ids of each prompt, with what the tokenizer puts in front of a text, but not with what ends one.

    Raises:
        PromptError: a prompt has no tokens, or more than the model has positions.
    """
    behind = len(tokenizer.surroundings()[1])
    limit = max_tokens(arch)
    encoded = [ids[: len(ids) - behind] for ids in tokenizer.encode_batch(prompts)]
    for number, (ids, text) in enumerate(zip(encoded, prompts, strict=True), start=1):
        shown = f"prompt {number} of {len(prompts)} ({text[:40]!r}{'...' if len(text) > 40 else ''})"
        if not ids:
            raise PromptError(f"{shown} has no tokens, and the tokenizer {tokenizer.name} begins no text by itself")
        if limit is not None and len(ids) > limit:
            raise PromptError(f"{shown} has {len(ids)} tokens, but the model has {limit} positions: shorten it")
    return encoded


def max_tokens(arch: Architecture) -> int | None:
    """Tokens that the model can read; None = any number."""
    return arch.max_positions if arch.position in ("rope", "learned") else None


class Text:
    """One prompt and what is written behind it.

    Args:
        tokenizer: of the model.
        prompt: its token ids.
        stop_words: texts that end it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_words: Sequence[str] = ()) -> None:
        self._tokenizer, self._prompt, self._stop_words = tokenizer, prompt, tuple(stop_words)
        self._start = self._decode(prompt)

    def _decode(self, tokens: Sequence[int]) -> str:
        """Ids without a text (rows of the embedding that no token has) leave nothing."""
        return self._tokenizer.decode([token for token in tokens if token < self._tokenizer.vocab_size])

    def _spelled(self, tokens: Sequence[int]) -> str:
        """What tokens behind the prompt spell.

        They are decoded together with the prompt: some tokenizers drop the space in front of a first word.
        """
        whole = self._decode([*self._prompt, *tokens])
        return whole[len(self._start) :] if whole.startswith(self._start) else self._decode(tokens)

    def written(self, tokens: Sequence[int]) -> str:
        """What tokens behind the prompt spell, up to the first stop word."""
        text = self._spelled(tokens)
        ends = [text.index(word) for word in self._stop_words if word in text]
        return text[: min(ends)] if ends else text

    def certain(self, tokens: Sequence[int]) -> str:
        """The part of `written` that stays whatever comes: whole characters, and no beginning of a stop word."""
        text = self.written(tokens).rstrip(_UNFINISHED)
        begun = [n for word in self._stop_words for n in range(1, len(word)) if text.endswith(word[:n])]
        return text[: len(text) - max(begun, default=0)]

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Whether there is a stop word in what tokens behind the prompt spell."""
        return bool(self._stop_words) and self.written(tokens) != self._spelled(tokens)

    def ending(self, arch: Architecture, *, ends: frozenset[int], new_tokens: int) -> Ending:
        """When it ends: at a token or a stop word, after so many tokens, or when the model has no more positions."""
        limit = max_tokens(arch)
        length = new_tokens if limit is None else min(new_tokens, limit - len(self._prompt) + 1)
        return Ending(tokens=ends, length=length, stopped=self.stopped)


class Stream:
    """Shows a text while it is written.

    Args:
        text: what is shown.
        show: told each new piece.
    """

    def __init__(self, text: Text, show: Callable[[str], None]) -> None:
        self._text, self._show = text, show
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        self._up_to(self._text.certain(self._tokens))

    def finish(self) -> None:
        """Show what was held back."""
        self._up_to(self._text.written(self._tokens))

    def _up_to(self, text: str) -> None:
        self._show(text[self._shown :])
        self._shown = max(self._shown, len(text))
