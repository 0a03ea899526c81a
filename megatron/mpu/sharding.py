"""Which parameter is split on which axis over the tensor-parallel ranks: one table, by logical name.

Every other parameter (norms, row-parallel biases, positions) is replicated. q, k, v and gate, up are separate
parameters, so a logical shape never depends on a layout.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHARD_DIM = {
    "embedding.word.weight": 0,  # [v, h]: vocabulary rows
    "attention.query.weight": 0,  # [n*d, h]: whole heads
    "attention.query.bias": 0,
    "attention.key.weight": 0,  # [g*d, h]: whole kv heads
    "attention.key.bias": 0,
    "attention.value.weight": 0,
    "attention.value.bias": 0,
    "attention.output.weight": 1,  # [h, n*d]: input columns; its bias is added after the reduction
    "mlp.gate.weight": 0,  # [f, h]
    "mlp.gate.bias": 0,
    "mlp.up.weight": 0,
    "mlp.up.bias": 0,
    "mlp.down.weight": 1,  # [h, f]
    "head.weight": 0,  # [v, h]: vocabulary rows
}


def shard_dim(name: str) -> int | None:
    """Dimension along which a parameter is split over the tensor-parallel ranks; None if it is replicated.

    Args:
        name: logical name, for example "layers.3.attention.query.weight".
    """
    parts = name.split(".")
    return _SHARD_DIM.get(".".join(parts[2:] if parts[0] == "layers" else parts))


def local_slice(name: str, logical_shape: Sequence[int], tp_rank: int, tp_size: int) -> tuple[slice, ...]:
    """The part of the logical tensor that one tensor-parallel rank holds, as an index.

    Raises:
        ValueError: if the dimension cannot be divided evenly.
    """
    index = [slice(0, length) for length in logical_shape]
    dim = shard_dim(name)
    if dim is not None:
        part, rest = divmod(logical_shape[dim], tp_size)
        if rest:
            raise ValueError(
                f"dimension {dim} of {name} has length {logical_shape[dim]}, which cannot be divided over "
                f"{tp_size} ranks (--tensor-model-parallel-size)"
            )
        index[dim] = slice(tp_rank * part, (tp_rank + 1) * part)
    return tuple(index)


def logical_shape(name: str, local_shape: Sequence[int], tp_size: int) -> tuple[int, ...]:
    """Shape of the whole tensor, given the shape of one rank's part."""
    dim = shard_dim(name)
    return tuple(length * (tp_size if at == dim else 1) for at, length in enumerate(local_shape))
