"""Continuing a text token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron.generation.sampling import Sampling, choose
from megatron.model.gpt import GPT
from megatron.model.inputs import ModelInputs


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    vocab_size: int,
    max_positions: int,
    new_tokens: int,
    sampling: Sampling,
    eod: int | None = None,
    generator: torch.Generator | None = None,
    emit: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """The tokens that follow a prompt. Every step reads the whole text again: simple, and exact for every model.

    Args:
        model: a whole model on one device.
        prompt: at least one token id.
        vocab_size: tokens that exist; rows beyond are padding.
        max_positions: tokens the model can see; of a longer text it sees the end.
        new_tokens: how many at most.
        sampling: how tokens are chosen.
        eod: ends the text; None = only the length does.
        generator: source of randomness, on the host: the same choices on every device.
        emit: told every new token at once.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens")
    model.eval()
    device = next(model.parameters()).device
    text = list(prompt)
    for _ in range(new_tokens):
        tokens: Tensor = torch.tensor([text[-max_positions:]], device=device)  # [1, s]
        logits = model(tokens, ModelInputs())[-1, :, :vocab_size]  # [1, v]
        token = int(choose(logits.cpu(), sampling, generator).item())
        if token == eod:
            break
        text.append(token)
        emit(token)
    return text[len(prompt) :]
