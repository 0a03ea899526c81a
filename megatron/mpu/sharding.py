"""Which parameter is split on which axis over the tensor-parallel ranks: one table, by logical name.

Every other parameter (norms, row-parallel biases, positions) is replicated. q, k, v and gate, up are separate
parameters, so a logical shape never depends on a layout.

Where there are more ranks than key-value heads, neighbouring ranks hold copies of one head: rank r of t has head
r // (t / heads), which is the head of its query heads, too.
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
    "mlp.shared.gate.weight": 0,
    "mlp.shared.gate.bias": 0,
    "mlp.shared.up.weight": 0,
    "mlp.shared.up.bias": 0,
    "mlp.shared.down.weight": 1,
    "mlp.experts.gate.weight": 1,  # [E, f, h]: E experts, which are split over the expert-parallel ranks
    "mlp.experts.gate.bias": 1,  # [E, f]
    "mlp.experts.up.weight": 1,
    "mlp.experts.up.bias": 1,
    "mlp.experts.down.weight": 2,  # [E, h, f]
    "head.weight": 0,  # [v, h]: vocabulary rows
}


def shard_dim(name: str) -> int | None:
    """Dimension along which a parameter is split over the tensor-parallel ranks; None if it is replicated.

    Args:
        name: logical name, for example "layers.3.attention.query.weight".
    """
    parts = name.split(".")
    return _SHARD_DIM.get(".".join(parts[2:] if parts[0] == "layers" else parts))


def kv_copies(num_kv_heads: int, tp_size: int) -> int:
    """Tensor-parallel ranks that hold each key-value head: 1 unless there are fewer heads than ranks.

    Raises:
        ValueError: if ranks and heads do not divide each other.
    """
    if max(num_kv_heads, tp_size) % min(num_kv_heads, tp_size):
        raise ValueError(
            f"{num_kv_heads} key-value heads (--num-key-value-heads) and {tp_size} ranks "
            "(--tensor-model-parallel-size): one must be a multiple of the other"
        )
    return max(1, tp_size // num_kv_heads)


def is_replicated_kv(name: str, copies: int) -> bool:
    """Whether `copies` ranks hold the same part of a parameter that is split: a key or value weight or bias."""
    return copies > 1 and (".attention.key." in name or ".attention.value." in name)


def is_expert(name: str) -> bool:
    """Whether a parameter holds all experts of a layer, one behind the other along dimension 0.

    Args:
        name: logical name.
    """
    return ".mlp.experts." in name


def local_slice(
    name: str, logical_shape: Sequence[int], tp_rank: int, tp_size: int, copies: int = 1
) -> tuple[slice, ...]:
    """The part of the logical tensor that one tensor-parallel rank holds, as an index.

    Args:
        name: logical name.
        logical_shape: of the whole tensor.
        tp_rank, tp_size: the rank, and how many there are.
        copies: ranks that hold each key-value head, see `kv_copies`.

    Raises:
        ValueError: if the dimension cannot be divided evenly.
    """
    index = [slice(0, length) for length in logical_shape]
    dim = shard_dim(name)
    if is_replicated_kv(name, copies):
        tp_rank, tp_size = tp_rank // copies, tp_size // copies
    if dim is not None:
        part, rest = divmod(logical_shape[dim], tp_size)
        if rest:
            raise ValueError(
                f"dimension {dim} of {name} has length {logical_shape[dim]}, which cannot be divided over "
                f"{tp_size} ranks (--tensor-model-parallel-size)"
            )
        index[dim] = slice(tp_rank * part, (tp_rank + 1) * part)
    return tuple(index)


def logical_shape(name: str, local_shape: Sequence[int], tp_size: int, copies: int = 1) -> tuple[int, ...]:
    """Shape of the whole tensor, given the shape of one rank's part; arguments as for `local_slice`."""
    dim = shard_dim(name)
    parts = tp_size // copies if is_replicated_kv(name, copies) else tp_size
    return tuple(length * (parts if at == dim else 1) for at, length in enumerate(local_shape))
