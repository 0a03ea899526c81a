"""Continuing texts token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron.generation.search import Continuation, Search
from megatron.model.cache import KeyValueCache
from megatron.model.inputs import ModelInputs

Read = Callable[[Tensor, ModelInputs, Sequence[int]], Tensor]
"""See `reading.Reader.__call__`."""


@torch.no_grad()  # in inference_mode devices outside of torch, such as PyTorch/XLA's, cannot take views of weights
def generate(read: Read, prompts: Sequence[Sequence[int]], search: Search, *, new_tokens: int) -> list[Continuation]:
    """Continue all prompts at a time. Each token is read once.

    Args:
        read: a model.
        prompts: token ids of each, at least one; lengths may differ.
        search: decides how they go on.
        new_tokens: the most that `search` writes for one prompt.

    Returns:
        One continuation for each prompt.
    """
    lengths = [len(prompt) for prompt in prompts]
    cache = KeyValueCache(max(lengths) + new_tokens)
    cache.length = max(lengths)
    # What fills up the shorter prompts is of no account: nothing before it sees it, and it is overwritten.
    tokens = torch.tensor([[*prompt, *(0,) * (cache.length - len(prompt))] for prompt in prompts])
    logits = read(tokens, ModelInputs(cache=cache), [length - 1 for length in lengths])
    while (step := search.advance(logits)).parents:
        if step.parents != list(range(len(lengths))):
            cache.select(step.parents)
            lengths = [lengths[parent] for parent in step.parents]
        cache.length = max(lengths) + 1
        inputs = ModelInputs(position_ids=torch.tensor(lengths)[:, None], cache=cache)
        logits = read(torch.tensor(step.tokens)[:, None], inputs, [0] * len(lengths))
        lengths = [length + 1 for length in lengths]
    return search.results()
