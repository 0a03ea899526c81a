"""Whether a dataset can have been written with the tokenizer that is about to train on it."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megatron.tokenizer.base import TokenizerError

_UINT16_LIMIT = 65500


class Sized(Protocol):
    """What the checks need to know of a tokenizer."""

    name: str
    vocab_size: int


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The type of ids on disk, by Megatron's rule: uint16 for fewer than 65500 tokens, int32 otherwise."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_LIMIT else np.int32)


def check_fits(tokenizer: Sized, *, max_id: int, dtype: np.dtype[np.integer], dataset: str) -> None:
    """Refuse a dataset that another tokenizer must have written.

    Args:
        tokenizer: the tokenizer of the run.
        max_id: the highest token id seen in the dataset.
        dtype: the type of its ids on disk.
        dataset: what to call it in the message.

    Raises:
        TokenizerError: an id lies outside the vocabulary, or the type is too narrow for this vocabulary.
    """
    if max_id >= tokenizer.vocab_size:
        raise TokenizerError(
            f"{dataset} holds token id {max_id}, but {tokenizer.name} has only ids 0 to {tokenizer.vocab_size - 1}: "
            "it was written with another tokenizer. Preprocess it again, or give its own tokenizer (--tokenizer-type, "
            "--tokenizer-model)"
        )
    if np.iinfo(dtype).max < tokenizer.vocab_size - 1:
        raise TokenizerError(
            f"{dataset} stores ids as {dtype}, at most {np.iinfo(dtype).max}, but {tokenizer.name} has "
            f"{tokenizer.vocab_size} ids: it was written with another tokenizer. Preprocess it again"
        )
