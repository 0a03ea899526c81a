"""What is written equals what `generate` of Hugging Face writes, for prompts of any lengths at once."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron.generation import BeamSettings, Ending, Sampled, Sampling, SamplingError, generate
from megatron.generation.sampling import probabilities
from megatron.model.gpt import ModelInputs
from tests.generation.helpers import (
    GREEDY,
    PROMPTS,
    Watched,
    reader_of,
    sampled,
    searched,
    their_model,
    their_tokens,
)
from tests.model.helpers import relative_error

FAMILIES = (
    *("llama-gqa", "llama-3.1", "llama-interpolated", "mistral", "mixtral", "qwen3"),
    *("bloom", "bloom-6-heads", "gpt2"),
)
ENDS = frozenset({2, 7, 19, 23, 40, 55, 66, 81})
"""So many that random models end some texts early."""

# Rounding of float32 in products of other shapes, relative to the largest logit.
LOGITS_TOLERANCE = 1e-5


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_equals_hugging_face(case: str) -> None:
    theirs = their_model(case)
    found = sampled(reader_of(theirs), length=20, ends=ENDS)
    for prompt, result in zip(PROMPTS, found, strict=True):
        expected = their_tokens(theirs, prompt, max_new_tokens=20, eos_token_id=list(ENDS))
        assert result.tokens == expected
        assert result.reason == ("length" if len(expected) == 20 else "eos")


@pytest.mark.parametrize("case", ["llama-gqa", "mistral", "mixtral", "bloom", "gpt2"])
def test_logits_equal_those_without_a_cache(case: str) -> None:
    reader = reader_of(their_model(case))
    watched = Watched(PROMPTS, length=15)
    results = generate(reader, PROMPTS, watched, new_tokens=15)
    for number, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        text = torch.tensor([[*prompt, *result.tokens]])
        whole = reader._stage(text, ModelInputs())[:, 0]
        expected = whole[len(prompt) - 1 : -1]
        assert relative_error(torch.stack([step[number] for step in watched.logits]), expected) < LOGITS_TOLERANCE


@pytest.mark.parametrize("case", ["llama-gqa", "mistral", "mixtral", "bloom", "gpt2"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_beam_search_equals_hugging_face(case: str, length_penalty: float) -> None:
    theirs = their_model(case)
    settings = BeamSettings(width=3, length_penalty=length_penalty)
    found = searched(reader_of(theirs), settings, length=12, ends=ENDS)
    asked = {"max_new_tokens": 12, "num_beams": 3, "length_penalty": length_penalty, "eos_token_id": list(ENDS)}
    assert [result.tokens for result in found] == [their_tokens(theirs, prompt, **asked) for prompt in PROMPTS]


def test_repetition_penalty_equals_hugging_face() -> None:
    theirs = their_model("llama-gqa")
    reader = reader_of(theirs)
    asked = {"max_new_tokens": 12, "repetition_penalty": 1.3}
    found = sampled(reader, sampling=Sampling(temperature=0.0, repetition_penalty=1.3), length=12)
    assert [result.tokens for result in found] == [their_tokens(theirs, prompt, **asked) for prompt in PROMPTS]
    beams = searched(reader, BeamSettings(width=2, repetition_penalty=1.3))
    assert [result.tokens for result in beams] == [
        their_tokens(theirs, prompt, num_beams=2, **asked) for prompt in PROMPTS
    ]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.7, top_k=9), Sampling(top_p=0.6), Sampling(top_k=20, top_p=0.5)]
)
def test_tokens_are_drawn_from_the_distribution_of_hugging_face(sampling: Sampling) -> None:
    logits = 3 * torch.randn(5, 83, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1.0:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    torch.testing.assert_close(probabilities(logits, sampling), expected.softmax(-1))


def test_a_text_depends_on_its_seed_alone() -> None:
    """Not on the prompts beside it, nor on when those end."""
    reader = reader_of(their_model("llama-gqa"))
    sampling = Sampling(temperature=1.5, top_k=40)
    together = sampled(reader, sampling=sampling, ends=ENDS)
    for number, prompt in enumerate(PROMPTS):
        search = Sampled([prompt], [Ending(tokens=ENDS, length=20)], sampling=sampling, seeds=[number])
        assert generate(reader, [prompt], search, new_tokens=20) == [together[number]]
    assert len({tuple(result.tokens) for result in together}) == len(PROMPTS)


def test_tokens_are_told_as_they_come() -> None:
    told: list[tuple[int, int]] = []
    endings = [Ending(tokens=frozenset(), length=4)] * 2
    search = Sampled(PROMPTS[:2], endings, sampling=GREEDY, seeds=[0, 0], emit=lambda *pair: told.append(pair))
    results = generate(reader_of(their_model("gpt2")), PROMPTS[:2], search, new_tokens=4)
    assert told == [(number, results[number].tokens[at]) for at in range(4) for number in range(2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"top_k": -1}, "--top-k is -1"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty is 0.0"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        Sampling(**settings)
