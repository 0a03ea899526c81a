"""How NeuronX Distributed shares attention weights out over tensor-parallel ranks.

With fewer key-value heads than ranks every key-value head is stored `m` times (the "KV size multiplier"), and the query
heads are ordered so that a rank's queries belong to its key-value head. There are g*m positions, in equal numbers on
each rank in order:

| order    | key-value head at position p | block of query heads at position p |
|----------|------------------------------|------------------------------------|
| tiled    | p mod g                      | (p mod g) * m + p // g             |
| adjacent | p // m                       | p                                  |

where a block is n / (g*m) consecutive query heads. The columns of the output projection follow the query heads. trn1
uses the tiled order, trn2 the adjacent one. A rank has its query, key and value rows as three tensors (weight_q, ...)
or one after the other in one (weight_qkv).
Legend: h=hidden, n=query heads, g=kv heads, d=head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats.nxd_shared import Shared, plain, stacked
from megatron.checkpoint.formats.options import Style
from megatron.checkpoint.formats.parts import Split
from megatron.config.architecture import Architecture

_QKV = ("query", "key", "value")
_GROUPED = {"query": "qkv_proj.weight_q", "key": "qkv_proj.weight_k", "value": "qkv_proj.weight_v"}
_SEPARATE = {"query": "q_proj.weight", "key": "k_proj.weight", "value": "v_proj.weight"}
_MARKS: dict[Style, str] = {
    "grouped": "qkv_proj.weight_q",
    "fused": "qkv_proj.weight_qkv",
    "coalesced": "qkv_proj.weight",
    "separate": "q_proj.weight",
}
_OUTPUT = "o_proj.weight"
_ROWS = Split(0)


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """Where heads are.

    Attributes:
        groups: key-value heads g.
        multiplier: copies m of each.
        kv_tiled, query_tiled: the order of key-value heads and of queries; they differ only in checkpoints that NxD's
            own converter made for trn2.
    """

    groups: int
    multiplier: int
    kv_tiled: bool = True
    query_tiled: bool = True

    def kv_heads(self) -> list[int]:
        """The key-value head at each position."""
        positions = range(self.groups * self.multiplier)
        return [p % self.groups if self.kv_tiled else p // self.multiplier for p in positions]

    def query_blocks(self) -> list[int]:
        """The block of query heads at each position."""
        positions = range(self.groups * self.multiplier)
        if not self.query_tiled:
            return list(positions)
        return [p % self.groups * self.multiplier + p // self.groups for p in positions]


def layout_for(arch: Architecture, tp: int, multiplier: int | None, *, tiled: bool) -> KvLayout:
    """The layout for a number of ranks.

    Args:
        arch: of the model.
        tp: tensor-parallel ranks.
        multiplier: copies of each key-value head; None: as few as will do.
        tiled: the order.

    Raises:
        CheckpointError: heads cannot be shared out so.
    """
    groups = arch.num_kv_heads
    copies = multiplier or max(1, tp // groups)
    if (groups * copies) % tp or tp % copies or arch.num_heads % (groups * copies):
        raise CheckpointError(
            f"{groups} key-value heads times {copies} (--kv-size-multiplier) cannot be shared out over {tp} ranks with "
            f"{arch.num_heads} query heads: {tp} must divide their product, {copies} must divide {tp}, and the product "
            "must divide the number of query heads"
        )
    return KvLayout(groups=groups, multiplier=copies, kv_tiled=tiled, query_tiled=tiled)


def share_queries(weight: Tensor, layout: KvLayout, ranks: int) -> list[Tensor]:
    """Rows [n*d, ...] of the queries, or of the transposed output projection, on each rank."""
    blocks = weight.unflatten(0, (layout.groups * layout.multiplier, -1))
    return [blocks[part].flatten(0, 1) for part in _parts(layout.query_blocks(), ranks)]


def share_kv(weight: Tensor, layout: KvLayout, ranks: int) -> list[Tensor]:
    """Rows [g*d, ...] of the keys or values on each rank."""
    heads = weight.unflatten(0, (layout.groups, -1))
    return [heads[part].flatten(0, 1) for part in _parts(layout.kv_heads(), ranks)]


def _parts(positions: Sequence[int], ranks: int) -> list[list[int]]:
    each = len(positions) // ranks
    return [list(positions[rank * each : (rank + 1) * each]) for rank in range(ranks)]


def joined_queries(parts: Sequence[Tensor], layout: KvLayout) -> Tensor:
    """The inverse of `share_queries`."""
    blocks: Tensor = torch.cat(list(parts)).unflatten(0, (layout.groups * layout.multiplier, -1))
    order = torch.tensor(layout.query_blocks())
    return blocks[order.argsort()].flatten(0, 1)


def joined_kv(parts: Sequence[Tensor], layout: KvLayout, name: str) -> Tensor:
    """The inverse of `share_kv`.

    Raises:
        CorruptCheckpoint: the copies of a head differ.
    """
    heads = torch.cat(list(parts)).unflatten(0, (layout.groups * layout.multiplier, -1))
    where = torch.tensor(layout.kv_heads())
    copies = torch.stack([heads[where == head] for head in range(layout.groups)], 1)
    if not all(torch.equal(copies[0], other) for other in copies[1:]):
        raise CorruptCheckpoint(f"{name}: the {layout.multiplier} copies of its heads differ")
    return copies[0].flatten(0, 1)


def shared_attention(prefix: str, ours: str, style: Style, layout: KvLayout, arch: Architecture) -> list[Shared]:
    """The attention tensors of a layer.

    Args:
        prefix, ours: what stands before their names, and before the logical names.
        style: how they are stored.
        layout: where heads are, for the styles "grouped" and "fused".
        arch: of the model.
    """
    names = tuple(f"{ours}{part}.weight" for part in _QKV)
    output = f"{ours}output.weight"
    if style in ("coalesced", "separate"):
        result = [plain(prefix + _OUTPUT, output, Split(1))]
        if style == "separate":
            return [
                plain(prefix + _SEPARATE[part], name, _ROWS) for part, name in zip(_QKV, names, strict=True)
            ] + result
        return [stacked(prefix + _MARKS[style], names), *result]
    columns = Shared(
        name=prefix + _OUTPUT,
        ours=(output,),
        cut=lambda parts, ranks: [share.t() for share in share_queries(parts[0].t(), layout, ranks)],
        join=lambda shares: (joined_queries([share.t() for share in shares], layout).t(),),
    )
    if style == "fused":
        return [_fused(prefix + _MARKS[style], names, layout, arch), columns]
    query = Shared(
        name=prefix + _GROUPED["query"],
        ours=names[:1],
        cut=lambda parts, ranks: share_queries(parts[0], layout, ranks),
        join=lambda shares: (joined_queries(shares, layout),),
    )
    return [query, *(_copied(prefix + _GROUPED[part], f"{ours}{part}.weight", layout) for part in _QKV[1:]), columns]


def _copied(name: str, ours: str, layout: KvLayout) -> Shared:
    return Shared(
        name=name,
        ours=(ours,),
        cut=lambda parts, ranks: share_kv(parts[0], layout, ranks),
        join=lambda shares: (joined_kv(shares, layout, name),),
    )


def _fused(name: str, ours: tuple[str, ...], layout: KvLayout, arch: Architecture) -> Shared:
    def cut_fused(parts: tuple[Tensor, ...], ranks: int) -> list[Tensor]:
        query, key, value = parts
        shares = (share_queries(query, layout, ranks), share_kv(key, layout, ranks), share_kv(value, layout, ranks))
        return [torch.cat(share) for share in zip(*shares, strict=True)]

    def join_fused(shares: Sequence[Tensor]) -> tuple[Tensor, ...]:
        query, key, value = zip(*(split_fused(share, arch, len(shares)) for share in shares), strict=True)
        return joined_queries(query, layout), joined_kv(key, layout, name), joined_kv(value, layout, name)

    return Shared(name=name, ours=ours, cut=cut_fused, join=join_fused)


def split_fused(share: Tensor, arch: Architecture, ranks: int) -> tuple[Tensor, ...]:
    """The rows of query, key and value in a rank's fused tensor."""
    query = arch.num_heads * arch.head_dim // ranks
    other = (share.shape[0] - query) // 2
    rows: tuple[Tensor, ...] = share.split([query, other, other])
    return rows


def found_attention(
    stored: Mapping[str, Sequence[Tensor]], arch: Architecture, *, query_tiled: bool | None
) -> tuple[Style, KvLayout]:
    """How attention is stored, found from one layer.

    Args:
        stored: attention tensors of a layer, of all ranks, by name without prefix.
        arch: of the model.
        query_tiled: the order of the queries; None: that of the keys.

    Raises:
        CorruptCheckpoint: it is stored in no known way.
    """
    style = next((style for style, mark in _MARKS.items() if mark in stored), None)
    if style is None:
        raise CorruptCheckpoint(f"no attention weights among {', '.join(sorted(stored)) or 'nothing'}")
    if style in ("coalesced", "separate"):
        return style, KvLayout(groups=arch.num_kv_heads, multiplier=1)
    if style == "grouped":
        return style, _found_layout(stored[_GROUPED["key"]], arch, query_tiled)
    shares = stored[_MARKS["fused"]]
    return style, _found_layout([split_fused(share, arch, len(shares))[1] for share in shares], arch, query_tiled)


def _found_layout(keys: Sequence[Tensor], arch: Architecture, query_tiled: bool | None) -> KvLayout:
    """The number of copies follows from the size of the keys, their order from which copies are equal."""
    rows = sum(part.shape[0] for part in keys)
    copies, rest = divmod(rows, arch.num_kv_heads * arch.head_dim)
    if rest or copies < 1:
        raise CorruptCheckpoint(f"keys have {rows} rows, which is no multiple of the key-value heads")
    for tiled in (True, False):
        query = tiled if query_tiled is None else query_tiled
        layout = KvLayout(groups=arch.num_kv_heads, multiplier=copies, kv_tiled=tiled, query_tiled=query)
        try:
            joined_kv(keys, layout, "keys")
        except CorruptCheckpoint:
            continue
        return layout
    raise CorruptCheckpoint(f"keys: in no order are the {copies} copies of each head equal")
