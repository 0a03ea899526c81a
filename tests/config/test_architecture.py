from __future__ import annotations

import dataclasses

import pytest

from megatron.config.architecture import Architecture

SMALL = Architecture(
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    ffn_hidden_size=10,
    vocab_size=20,
    padded_vocab_size=24,
    max_positions=16,
)
EMBEDDING, ATTENTION, MLP, NORM = 20 * 8, 8 * (12 + 6 + 6) + 12 * 8, 3 * 8 * 10, 8
BASE = 2 * EMBEDDING + 2 * (ATTENTION + MLP + 2 * NORM) + NORM


def test_sum_of_the_parts():
    assert SMALL.num_parameters() == BASE
    assert SMALL.num_parameters(padded=True) == BASE + 2 * 4 * 8


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"tied_embeddings": True}, -EMBEDDING),
        ({"position": "learned"}, 16 * 8),
        ({"position": "alibi"}, 0),
        ({"norm": "layernorm"}, 5 * 8),
        ({"embedding_norm": True}, 8),
        ({"embedding_norm": True, "norm": "layernorm"}, 5 * 8 + 16),
        ({"activation": "gelu"}, -2 * 80),
        ({"activation": "geglu"}, 0),
        ({"qkv_bias": True}, 2 * 24),
        ({"linear_bias": True}, 2 * (24 + 8 + 20 + 8)),
        ({"linear_bias": True, "qkv_bias": True, "activation": "relu"}, 2 * (24 + 8 + 10 + 8) - 2 * 80),
        ({"qk_norm": True}, 2 * 6),
    ],
)
def test_what_each_setting_adds(change, difference):
    assert dataclasses.replace(SMALL, **change).num_parameters() == BASE + difference
