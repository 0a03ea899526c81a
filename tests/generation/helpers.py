"""Tiny random models of Hugging Face, the same models here, and ways to continue prompts with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.generation import BeamSearch, BeamSettings, Continuation, Ending, Reader, Sampled, Sampling, generate
from megatron.generation.search import Next
from megatron.model import hf
from megatron.model.gpt import GPT
from megatron.model.hf_config import architecture_from_hf_config
from megatron.mpu.groups import ProcessGroups, single_process
from megatron.ops import reference_ops
from tests.model import test_hf

_MIXTRAL = {**test_hf._LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
CASES = {**test_hf.CASES, "mixtral": ("Mixtral", _MIXTRAL)}

PROMPTS = ((5, 17, 42, 8, 61, 30, 30, 2, 9), (11,), (3, 14, 15, 9, 26), (70, 71, 72, 73, 74, 75, 76))
"""Of different lengths; the tokens are below 83."""

GREEDY = Sampling(temperature=0.0)


def their_model(case: str) -> Any:
    """A random model of transformers."""
    return test_hf._random_model(*CASES[case]).eval()


def reader_of(theirs: Any, groups: ProcessGroups | None = None) -> Reader:
    """The same model here."""
    arch = architecture_from_hf_config(theirs.config.to_dict())
    groups = groups or single_process()
    ours = GPT(arch, ops=reference_ops(), groups=groups)
    ours.load_state_dict(hf.from_hf(theirs.state_dict(), arch))
    return Reader(ours, arch, groups)


def their_tokens(theirs: Any, prompt: Sequence[int], **settings: Any) -> list[int]:
    """What `generate` of transformers writes behind one prompt, without padding and tokens that end texts."""
    ids = torch.tensor([prompt])
    ends = settings.pop("eos_token_id", None)
    with torch.no_grad():
        whole = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=ends, pad_token_id=0, do_sample=False, **settings
        )
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    first_end = next((at for at, token in enumerate(tokens) if token in (ends or ())), len(tokens))
    return tokens[:first_end]


def sampled(
    read: Any,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    sampling: Sampling = GREEDY,
    *,
    length: int = 20,
    ends: frozenset[int] = frozenset(),
) -> list[Continuation]:
    """Continue prompts token by token."""
    endings = [Ending(tokens=ends, length=length)] * len(prompts)
    search = Sampled(prompts, endings, sampling=sampling, seeds=range(len(prompts)))
    return generate(read, prompts, search, new_tokens=length)


def searched(
    read: Any,
    settings: BeamSettings,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    length: int = 12,
    ends: frozenset[int] = frozenset(),
) -> list[Continuation]:
    """Continue prompts by a search."""
    endings = [Ending(tokens=ends, length=length)] * len(prompts)
    return generate(read, prompts, BeamSearch(prompts, endings, settings=settings), new_tokens=length)


class Watched(Sampled):
    """Keeps the logits that it was given, by prompt."""

    def __init__(self, prompts: Sequence[Sequence[int]], *, length: int) -> None:
        endings = [Ending(tokens=frozenset(), length=length)] * len(prompts)
        super().__init__(prompts, endings, sampling=GREEDY, seeds=range(len(prompts)))
        self.logits: list[Tensor] = []

    def advance(self, logits: Tensor) -> Next:
        self.logits.append(logits)
        return super().advance(logits)
