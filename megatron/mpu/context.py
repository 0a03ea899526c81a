"""Which tokens of a sequence each context-parallel rank has: pure arithmetic, no process groups, no torch.

Causal attention gives late tokens more work than early ones. So a sequence is cut into twice as many chunks as there
are ranks in the ring, and ring rank r has chunks r and 2 ring - 1 - r ("zigzag"): every rank then computes equally many
pairs of chunks in every turn of the ring (Llama 3, arXiv:2407.21783, section 3.3.2). The ranks that share a sequence by
heads (Ulysses) split the tokens of their place in the ring evenly, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class SequencePart:
    """The place of a rank among those that share a sequence.

    Attributes:
        ring: ranks that pass on keys and values.
        turn: which of them this is.
        ulysses: ranks at each place of the ring, which exchange heads.
        share: which of them this is.
    """

    ring: int = 1
    turn: int = 0
    ulysses: int = 1
    share: int = 0

    @property
    def ranks(self) -> int:
        """Ranks that share a sequence."""
        return self.ring * self.ulysses

    def tokens(self, length: int) -> list[int]:
        """Positions of this rank's tokens in a sequence of `length` tokens, ascending.

        Raises:
            ValueError: if the sequence cannot be cut evenly.
        """
        multiple = length_multiple(self.ring, self.ulysses)
        if length % multiple:
            raise ValueError(
                f"a sequence of {length} tokens cannot be shared by {self.ring} x {self.ulysses} ranks; --seq-length "
                f"must be a multiple of {multiple}"
            )
        chunk = length // (2 * self.ring)
        held = [at for number in own_chunks(self.turn, self.ring) for at in range(number * chunk, (number + 1) * chunk)]
        size = len(held) // self.ulysses
        return held[self.share * size : (self.share + 1) * size]


WHOLE = SequencePart()
"""Of a rank that has its sequences to itself."""


def length_multiple(ring: int, ulysses: int) -> int:
    """What the length of a sequence must be a multiple of."""
    return 2 * ring * ulysses if ring > 1 else ulysses


def own_chunks(turn: int, ring: int) -> tuple[int, int]:
    """The two chunks of a rank of the ring."""
    return turn, 2 * ring - 1 - turn


class ChunkPair(NamedTuple):
    """Queries of one chunk that see keys of another.

    Attributes:
        query: 0 or 1, which chunk of the rank.
        key: 0 or 1, which chunk of the rank that the keys come from.
        chunks_between: how many chunks the queries are behind the keys; 0 is the same chunk.
    """

    query: int
    key: int
    chunks_between: int


def chunk_pairs(turn: int, source: int, ring: int, *, chunk: int, window: int | None) -> list[ChunkPair]:
    """What a rank has to compute with the keys and values of rank `source` of the ring.

    Args:
        turn: the rank.
        source: where the keys are from.
        ring: number of ranks.
        chunk: tokens of a chunk.
        window: of the attention; pairs that are out of its reach are left out.
    """
    pairs = [
        ChunkPair(query, key, mine - theirs)
        for query, mine in enumerate(own_chunks(turn, ring))
        for key, theirs in enumerate(own_chunks(source, ring))
        if mine >= theirs
    ]
    if window is None:
        return pairs
    return [pair for pair in pairs if (pair.chunks_between - 1) * chunk + 1 < window or pair.chunks_between == 0]
