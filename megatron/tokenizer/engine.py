"""Which library turns text into ids when a corpus is tokenized, and the proof that it does not matter for the ids."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from megatron.tokenizer.base import TextError, Tokenizer, TokenizerError, require_unicode
from megatron.tokenizer.flat import FlatEncoder, ListEncoder

Engine = Literal["gigatoken", "own"]
AskedEngine = Literal["auto", "gigatoken", "own"]

_PROBES = 400
_LONG_RUN = 5000
_SURROGATES = range(0xD800, 0xE000)
_FRAGMENTS = (
    *(" ", "  ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u2028", "\u3000", "\u200b", "\x00", "\u2581"),
    *("the", " The", "I'll", "WE'VE", "'S", "don't", "_x", "__init__", "3.14", "1234567", "//", "/*", "=====", "..."),
    *("na\u00efve", "\u0130\u017f\u01c5", "\u6f22\u5b57", "\ufdfa", "e\u0301", "\U0001f600\u200d", "\u0e01\u0e31"),
)


@dataclass(frozen=True)
class EngineChoice:
    """The engine, and the sentence that says which it is and why."""

    engine: Engine
    line: str


def load_encoder(tokenizer: Tokenizer, engine: Engine) -> FlatEncoder:
    """The encoder of an engine that `choose_engine` chose for this tokenizer."""
    if engine == "own":
        return ListEncoder(tokenizer)
    from megatron.tokenizer import gigatoken

    return gigatoken.GigatokenEncoder(cast("Any", tokenizer))


def choose_engine(tokenizer: Tokenizer, asked: AskedEngine, sample: Sequence[str]) -> EngineChoice:
    """The fastest engine that gives the ids of the tokenizer itself.

    Args:
        tokenizer: what defines the ids.
        asked: `auto` falls back to the tokenizer itself, `gigatoken` does not.
        sample: texts of the corpus, on which the engines are compared besides made-up ones.

    Raises:
        TokenizerError: gigatoken was asked for and cannot be used.
    """
    if asked == "own":
        return EngineChoice("own", f"tokenization engine: {tokenizer.name} itself, as asked for")
    reason, compared = _reason_against(tokenizer, sample)
    if reason is None:
        return EngineChoice("gigatoken", f"tokenization engine: gigatoken, {compared}")
    if asked == "gigatoken":
        raise TokenizerError(f"--tokenizer-engine gigatoken cannot be used: {reason}. Take auto, or own")
    return EngineChoice("own", f"tokenization engine: {tokenizer.name} itself, since {reason}")


def _reason_against(tokenizer: Tokenizer, sample: Sequence[str]) -> tuple[str | None, str]:
    """Why gigatoken cannot be used, or None and what was compared."""
    from megatron.tokenizer import gigatoken

    installed = gigatoken.version()
    if installed is None:
        return "the faster gigatoken is not installed (pip install gigatoken)", ""
    reason = gigatoken.obstacle(tokenizer)
    if reason is not None:
        return f"gigatoken may not stand in for it: {reason}", ""
    try:
        encoder = load_encoder(tokenizer, "gigatoken")
    except Exception as error:  # The library raises bare exceptions for files it does not take.
        return f"gigatoken {installed} does not load it: {str(error).splitlines()[0]}", ""
    texts = [text for text in sample if _is_unicode(text)]
    different = first_difference(tokenizer, encoder, [*probes(tokenizer), *texts])
    if different is not None:
        return f"gigatoken {installed} gives other ids for {different[:60]!r}", ""
    return None, (
        f"version {installed}: same ids as {tokenizer.name} on {_PROBES} made-up texts and {len(texts)} of the input"
    )


def first_difference(tokenizer: Tokenizer, encoder: FlatEncoder, texts: Sequence[str]) -> str | None:
    """The first text whose ids differ between an encoder and the tokenizer itself."""
    rows = encoder(texts).rows()
    expected = ListEncoder(tokenizer)(texts).rows()
    return next((text for text, a, b in zip(texts, rows, expected, strict=True) if a != b), None)


def probes(tokenizer: Tokenizer, seed: int = 0, number: int = _PROBES) -> Iterator[str]:
    """Texts that tokenizers get wrong: odd white space, all of Unicode, long runs, special tokens spelled out."""
    rng = random.Random(seed)
    ends = [tokenizer.decode([i]) for i in {tokenizer.eod, tokenizer.bos, tokenizer.eos, tokenizer.pad} - {None}]
    fragments = [*_FRAGMENTS, *(end for end in ends if end)]
    for count in range(number):
        size = 1 + int(rng.expovariate(1 / 30))
        kind = count % 5
        if kind == 0:
            yield "".join(_character(rng) for _ in range(size))
        elif kind == 1:
            yield "".join(rng.choice(fragments) for _ in range(size))
        elif kind == 2:
            yield "".join(rng.choice((rng.choice(fragments), _character(rng))) for _ in range(size))
        elif kind == 3:
            yield "".join(chr(rng.randrange(0x250)) for _ in range(size))
        else:
            run = rng.choice((*fragments, _character(rng)))
            yield run * rng.choice((2, 17, 100, _LONG_RUN // len(run) if count < 50 else 3))


def _character(rng: random.Random) -> str:
    plane = rng.choice((0x3000, 0x10000, 0x110000))
    code = rng.randrange(plane)
    return chr(code) if code not in _SURROGATES else "\u0085"


def _is_unicode(text: str) -> bool:
    try:
        require_unicode(text)
    except TextError:
        return False
    return True
