"""From prompts as text to texts that continue them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron.generation.beams import BeamSearch, BeamSettings
from megatron.generation.generate import generate
from megatron.generation.restore import Restored
from megatron.generation.sampling import Sampling, SamplingError
from megatron.generation.search import Ending, Reason, Sampled, Search
from megatron.generation.text import Stream, Text, encode_prompts

Show = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is to be written.

    Attributes:
        choice: how tokens are chosen.
        new_tokens: the most that are written behind a prompt.
        stop_words: texts that end what is written, and are not part of it.
        ignore_ends: go on behind the end of a text.
        seed: of the first prompt; that of the next is one more, so that no text depends on the others.
        batch_size: prompts that are continued at a time.
    """

    choice: Sampling | BeamSettings
    new_tokens: int = 100
    stop_words: tuple[str, ...] = ()
    ignore_ends: bool = False
    seed: int = 1234
    batch_size: int = 8

    def __post_init__(self) -> None:
        for flag, value in (("--max-new-tokens", self.new_tokens), ("--batch-size", self.batch_size)):
            if value < 1:
                raise SamplingError(f"{flag} is {value}; it must be at least 1")
        if "" in self.stop_words:
            raise SamplingError("--stop is empty: give the text at which to stop")


@dataclass(frozen=True)
class Written:
    """One prompt, what was written behind it (as text and as tokens), and why it ended."""

    prompt: str
    text: str
    tokens: list[int]
    reason: Reason


def write(found: Restored, prompts: Sequence[str], wishes: Wishes, show: Show | None = None) -> Iterator[Written]:
    """Continue prompts. Every rank does the same.

    Args:
        found: the model.
        prompts: texts.
        wishes: how they go on.
        show: told each new piece of the first text of each batch while it is written; not with a search.

    Yields:
        One result for each prompt, in their order.

    Raises:
        PromptError: the model cannot continue a prompt.
    """
    encoded = encode_prompts(found.tokenizer, prompts, found.arch)
    ends = frozenset() if wishes.ignore_ends else found.ends
    for start in range(0, len(prompts), wishes.batch_size):
        batch = encoded[start : start + wishes.batch_size]
        texts = [Text(found.tokenizer, prompt, wishes.stop_words) for prompt in batch]
        endings = [text.ending(found.arch, ends=ends, new_tokens=wishes.new_tokens) for text in texts]
        stream = Stream(texts[0], show or (lambda piece: None))
        search = _search(batch, endings, wishes, wishes.seed + start, stream if show else None)
        results = generate(found.reader, batch, search, new_tokens=wishes.new_tokens)
        stream.finish()
        for prompt, text, result in zip(prompts[start:], texts, results, strict=False):
            yield Written(prompt, text.written(result.tokens), result.tokens, result.reason)


def _search(
    prompts: Sequence[Sequence[int]], endings: Sequence[Ending], wishes: Wishes, seed: int, stream: Stream | None
) -> Search:
    if isinstance(wishes.choice, BeamSettings):
        return BeamSearch(prompts, endings, settings=wishes.choice)

    def emit(prompt: int, token: int) -> None:
        if stream is not None and prompt == 0:
            stream.add(token)

    seeds = [seed + number for number in range(len(prompts))]
    return Sampled(prompts, endings, sampling=wishes.choice, seeds=seeds, emit=emit)
