"""Masks against Megatron's and against a plain loop."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.batch import (
    MaskRules,
    document_numbers,
    make_batch,
    mix_seed,
    own_tokens,
    positions_within_documents,
)
from megatron.mpu.context import SequencePart
from tests.data.corpora import EOD, GOLDEN


def everything(eod: int = EOD) -> MaskRules:
    return MaskRules(eod=eod, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)


def with_label(tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([tokens, np.full((len(tokens), 1), 7)], axis=1)


def test_masks_are_megatrons():
    golden = np.load(GOLDEN / "masks.npz")
    tokens = golden["tokens"]
    samples = with_label(tokens)
    real = np.ones(len(tokens), bool)
    batch = make_batch(samples, real, everything(), 0)
    assert np.array_equal(batch.loss_mask, golden["all_loss"])
    assert np.array_equal(batch.position_ids, golden["all_positions"])
    # Megatron's mask is True where attention is forbidden: after the query, or in another document.
    documents = batch.document_ids.numpy()
    other = documents[:, :, None] != documents[:, None, :]
    later = np.triu(np.ones((tokens.shape[1],) * 2, bool), 1)
    assert np.array_equal((other | later)[:, None], golden["all_attention"])
    plain = make_batch(samples, real, MaskRules(eod=EOD), 0)
    assert np.array_equal(plain.loss_mask, golden["plain_loss"])
    assert plain.position_ids is None
    assert plain.document_ids is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3))
def test_documents_and_positions_follow_a_plain_loop(rows):
    ends = np.array(rows)
    for row, documents, positions in zip(
        rows, document_numbers(ends).tolist(), positions_within_documents(ends).tolist(), strict=True
    ):
        document = position = 0
        for place, is_end in enumerate(row):
            assert (documents[place], positions[place]) == (document, position)
            document, position = (document + 1, 0) if is_end else (document, position + 1)


def test_tokens_labels_and_padding():
    samples = np.arange(10).reshape(2, 5)
    batch = make_batch(samples, np.array([True, False]), MaskRules(eod=3), 11)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.loss_mask.tolist() == [[1.0] * 4, [0.0] * 4]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert batch.dropout_seed == 11
    assert batch.to(torch.device("cpu")).tokens.tolist() == batch.tokens.tolist()


def test_a_part_has_its_tokens_and_knows_where_they_are():
    samples = np.arange(18).reshape(2, 9)
    part = SequencePart(ring=2, turn=0)
    whole = make_batch(samples, np.array([True, False]), MaskRules(eod=100), 11)
    assert own_tokens(whole, SequencePart()) is whole
    batch = own_tokens(whole, part)
    assert batch.tokens.tolist() == [[0, 1, 6, 7], [9, 10, 15, 16]]
    assert batch.labels.tolist() == [[1, 2, 7, 8], [10, 11, 16, 17]]
    assert batch.loss_mask.tolist() == [[1.0] * 4, [0.0] * 4]
    assert batch.position_ids.tolist() == [[0, 1, 6, 7]]
    assert batch.dropout_seed == 11


def test_a_part_has_its_positions_within_documents_and_all_documents():
    whole = make_batch(np.array([[5, EOD, 5, 5, 5, 5, EOD, 5, 5]]), np.array([True]), everything(), 0)
    batch = own_tokens(whole, SequencePart(ring=2, turn=1))
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]
    assert batch.document_ids.tolist() == whole.document_ids.tolist() == [[0, 0, 1, 1, 1, 1, 1, 2]]
    assert own_tokens(whole, SequencePart(ulysses=2, share=1)).position_ids.tolist() == [[2, 3, 4, 0]]


def test_dropout_seeds_are_distinct_and_fit_a_generator():
    seeds = {mix_seed(seed, position) for seed in range(30) for position in range(300)}
    assert len(seeds) == 30 * 300
    assert all(0 <= seed < 2**63 for seed in seeds)
