"""Attention of sequences that are spread over ranks, keys and values going round (arXiv:2310.01889).

In every turn a rank computes what its queries see among the keys it has, while these keys are on their way to the next
rank. Results are joined by their normalizers in float32. Backward, the gradients of keys and values follow them round,
summed in float32, until they are home. Nothing of other ranks is kept between forward and backward.

Legend: s=tokens of a rank, b=micro-batch, n=query heads, g=kv heads, d=head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.mpu.collectives import Pending, start_exchange
from megatron.mpu.context import chunk_pairs, own_chunks
from megatron.mpu.groups import Group
from megatron.ops import BlockRules, Ops


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    ops: Ops,
    scale: float,
    alibi_slopes: Tensor | None,
    document_ids: Tensor | None,
    window: int | None,
) -> Tensor:
    """`Ops.attention` without dropout, for the tokens that `mpu.context` gives to this rank.

    Args:
        q: [s, b, n, d].
        k, v: [s, b, g, d].
        group: the ranks of the ring, more than one.
        ops: the kernels.
        scale, alibi_slopes, window: as in `Ops.attention`.
        document_ids: of the whole sequence [b, s ranks], or None.

    Returns:
        [s, b, n, d] in q's dtype.
    """
    ring = _Ring(
        group=group,
        ops=ops,
        chunk=q.shape[0] // 2,
        scale=scale,
        alibi_slopes=alibi_slopes,
        document_ids=document_ids,
        window=window,
    )
    result: Tensor = _RingAttention.apply(q, k, v, ring)
    return result


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """What all turns have in common; `chunk` is the tokens of half a rank's part."""

    group: Group
    ops: Ops
    chunk: int
    scale: float
    alibi_slopes: Tensor | None
    document_ids: Tensor | None
    window: int | None

    def source(self, turn: int) -> int:
        """Whose keys and values this rank has in a turn."""
        return (self.group.rank - turn) % self.group.size

    def pass_on(self, x: Tensor) -> Pending:
        """Give `x` to the next rank and get that of the one before, in the background."""
        rank, size = self.group.rank, self.group.size
        return start_exchange(x, self.group, to=(rank + 1) % size, source=(rank - 1) % size)

    def pairs(self, source: int) -> Iterator[tuple[slice, slice, BlockRules]]:
        """Queries and keys of a turn, as rows of the parts of the ranks."""
        for pair in chunk_pairs(self.group.rank, source, self.group.size, chunk=self.chunk, window=self.window):
            rules = BlockRules(
                scale=self.scale,
                distance=pair.chunks_between * self.chunk,
                alibi_slopes=self.alibi_slopes,
                query_documents=self._documents(self.group.rank, pair.query),
                key_documents=self._documents(source, pair.key),
                window=self.window,
            )
            yield self._rows(pair.query), self._rows(pair.key), rules

    def _rows(self, half: int) -> slice:
        return slice(half * self.chunk, (half + 1) * self.chunk)

    def _documents(self, rank: int, half: int) -> Tensor | None:
        if self.document_ids is None:
            return None
        start = own_chunks(rank, self.group.size)[half] * self.chunk
        return self.document_ids[:, start : start + self.chunk]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        result = torch.zeros_like(q, dtype=wide)
        normalizers = q.new_full((q.shape[1], q.shape[2], q.shape[0]), -torch.inf, dtype=wide)
        held = torch.stack((k, v))
        for turn in range(ring.group.size):
            coming = ring.pass_on(held) if turn < ring.group.size - 1 else Pending(held)
            for rows, columns, rules in ring.pairs(ring.source(turn)):
                part = ring.ops.attention_block(q[rows], held[0, columns], held[1, columns], rules)
                _join(result[rows], normalizers[..., rows], *part)
            held = coming.wait()
        joined = result.to(q.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, joined, normalizers)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, result, normalizers = ctx.saved_tensors
        ring: _Ring = ctx.ring
        grad_q = torch.zeros_like(q, dtype=normalizers.dtype)
        held = torch.stack((k, v))
        following: Pending | None = None  # the gradients of what is held, from the ranks that had it before
        for turn in range(ring.group.size):
            coming = ring.pass_on(held) if turn < ring.group.size - 1 else Pending(held)
            grad_held = torch.zeros_like(held, dtype=normalizers.dtype)
            for rows, columns, rules in ring.pairs(ring.source(turn)):
                operands = (grad[rows], q[rows], held[0, columns], held[1, columns])
                totals = normalizers[..., rows].contiguous()
                parts = ring.ops.attention_block_backward(*operands, result[rows], totals, rules)
                grad_q[rows] += parts[0]
                grad_held[0, columns] += parts[1]
                grad_held[1, columns] += parts[2]
            if following is not None:
                grad_held += following.wait()
            following = ring.pass_on(grad_held)
            held = coming.wait()
        assert following is not None
        grad_k, grad_v = following.wait().to(k.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None


def _join(result: Tensor, normalizers: Tensor, part: Tensor, of_part: Tensor) -> None:
    """Add the result of further keys, in place.

    Args:
        result: [s, b, n, d] wide, of the keys so far.
        normalizers: [b, n, s] wide, of the same; minus infinity where no key has been seen.
        part, of_part: of the further keys.
    """
    totals = torch.logaddexp(normalizers, of_part)
    lowest = torch.finfo(totals.dtype).min  # where nothing has been seen yet, the difference would be no number
    old, new = ((x - totals.clamp_min(lowest)).exp().permute(2, 0, 1)[..., None] for x in (normalizers, of_part))
    result.mul_(old).addcmul_(part.to(result.dtype), new)
    normalizers.copy_(totals)
