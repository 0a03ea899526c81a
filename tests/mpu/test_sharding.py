"""The sharding table."""

from __future__ import annotations

import pytest

from megatron.mpu.sharding import local_slice, logical_shape, shard_dim


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


def test_uneven_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dimension 0 of head.weight has length 10.*3 ranks"):
        local_slice("head.weight", (10, 4), 0, 3)
