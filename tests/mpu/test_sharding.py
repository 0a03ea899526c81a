"""The sharding table."""

from __future__ import annotations

import pytest

from megatron.mpu.sharding import is_replicated_kv, kv_copies, local_slice, logical_shape, shard_dim


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("embedding.word.weight", 0),
        ("embedding.position.weight", None),
        ("embedding.norm.bias", None),
        ("layers.11.attention_norm.weight", None),
        ("layers.11.attention.query.weight", 0),
        ("layers.11.attention.key.bias", 0),
        ("layers.11.attention.query_norm.weight", None),
        ("layers.11.attention.output.weight", 1),
        ("layers.11.attention.output.bias", None),
        ("layers.11.mlp.gate.bias", 0),
        ("layers.11.mlp.down.weight", 1),
        ("layers.11.mlp.down.bias", None),
        ("final_norm.weight", None),
        ("head.weight", 0),
    ],
)
def test_split_dimension(name: str, dim: int | None) -> None:
    assert shard_dim(name) == dim


def test_parts_of_a_column_split_weight() -> None:
    name = "layers.0.mlp.down.weight"
    assert local_slice(name, (32, 48), 1, 4) == (slice(0, 32), slice(12, 24))
    assert logical_shape(name, (32, 12), 4) == (32, 48)
    assert logical_shape("final_norm.weight", (32,), 4) == (32,)


def test_copies_of_key_value_heads_are_neighbours() -> None:
    """Four ranks, two heads: the key of ranks 0 and 1 is that of their query heads, the first half."""
    name = "layers.0.attention.key.weight"
    assert [local_slice(name, (16, 32), rank, 4, 2)[0].start for rank in range(4)] == [0, 0, 8, 8]
    assert logical_shape(name, (8, 32), 4, 2) == (16, 32)
    assert local_slice("layers.0.attention.query.weight", (16, 32), 1, 4, 2)[0] == slice(4, 8)
    assert is_replicated_kv("layers.3.attention.value.bias", 2)
    assert not is_replicated_kv("layers.3.attention.key_norm.weight", 2)
    assert not is_replicated_kv(name, 1)


@pytest.mark.parametrize(("heads", "ranks", "copies"), [(8, 8, 1), (8, 4, 1), (8, 32, 4), (1, 2, 2), (4, 1, 1)])
def test_as_many_copies_as_give_every_rank_a_head(heads: int, ranks: int, copies: int) -> None:
    assert kv_copies(heads, ranks) == copies


@pytest.mark.parametrize(("heads", "ranks"), [(6, 4), (4, 6)])
def test_heads_and_ranks_that_do_not_divide_are_refused(heads: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=rf"{heads} key-value heads .*{ranks} ranks.*multiple"):
        kv_copies(heads, ranks)


def test_uneven_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dimension 0 of head.weight has length 10.*3 ranks"):
        local_slice("head.weight", (10, 4), 0, 3)
