"""Whether a dataset can have been written with the tokenizer that is about to train on it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron.tokenizer.base import Tokenizer, TokenizerError


def check_fits(tokenizer: Tokenizer, *, max_id: int, dtype: npt.DTypeLike, dataset: str) -> None:
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
            f"{dataset} stores ids as {np.dtype(dtype)}, at most {np.iinfo(dtype).max}, but {tokenizer.name} has "
            f"{tokenizer.vocab_size} ids: it was written with another tokenizer. Preprocess it again"
        )
