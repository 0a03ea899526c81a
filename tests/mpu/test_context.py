"""Who has which tokens, and who computes what, against plain loops over all tokens."""

from __future__ import annotations

import itertools

import pytest

from megatron.mpu.context import SequencePart, chunk_pairs, length_multiple, own_chunks

SHAPES = tuple(itertools.product((1, 2, 3, 4, 8), (1, 2, 4)))


def _parts(ring: int, ulysses: int) -> list[SequencePart]:
    return [
        SequencePart(ring=ring, turn=turn, ulysses=ulysses, share=share)
        for turn in range(ring)
        for share in range(ulysses)
    ]


@pytest.mark.parametrize(("ring", "ulysses"), SHAPES)
def test_every_token_has_one_rank(ring: int, ulysses: int) -> None:
    length = 3 * length_multiple(ring, ulysses) * 2
    parts = [part.tokens(length) for part in _parts(ring, ulysses)]
    assert sorted(itertools.chain(*parts)) == list(range(length))
    assert all(len(part) == length // (ring * ulysses) and part == sorted(part) for part in parts)


def test_a_ring_of_two_has_the_ends_and_the_middle() -> None:
    first, second = (SequencePart(ring=2, turn=turn).tokens(8) for turn in range(2))
    assert first == [0, 1, 6, 7]
    assert second == [2, 3, 4, 5]


def test_heads_are_exchanged_by_neighbours_in_the_sequence() -> None:
    assert SequencePart(ulysses=2, share=1).tokens(6) == [3, 4, 5]
    assert SequencePart(ring=2, turn=0, ulysses=2, share=1).tokens(8) == [6, 7]


@pytest.mark.parametrize(
    ("ring", "ulysses", "length", "multiple"), [(2, 1, 6, 4), (1, 4, 6, 4), (2, 2, 12, 8), (3, 1, 9, 6)]
)
def test_sequences_that_cannot_be_shared_are_refused(ring: int, ulysses: int, length: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=f"--seq-length must be a multiple of {multiple}"):
        SequencePart(ring=ring, ulysses=ulysses).tokens(length)


@pytest.mark.parametrize("ring", [2, 3, 4, 7])
@pytest.mark.parametrize("window", [None, 1, 4, 5, 9, 100])
def test_pairs_of_chunks_hold_all_pairs_of_tokens_that_see_each_other(ring: int, window: int | None) -> None:
    chunk = 4
    found = set()
    for turn, source in itertools.product(range(ring), repeat=2):
        for pair in chunk_pairs(turn, source, ring, chunk=chunk, window=window):
            query, key = own_chunks(turn, ring)[pair.query], own_chunks(source, ring)[pair.key]
            assert query - key == pair.chunks_between
            found.add((query, key))
    reach = 2 * ring * chunk if window is None else window
    needed = {
        (query // chunk, key // chunk)
        for query in range(2 * ring * chunk)
        for key in range(query + 1)
        if query - key < reach
    }
    assert found == needed


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_all_ranks_have_as_much_to_do_in_every_turn(ring: int) -> None:
    for turns_back in range(ring):
        counts = {
            len(chunk_pairs(turn, (turn - turns_back) % ring, ring, chunk=1, window=None)) for turn in range(ring)
        }
        assert counts == {3 if turns_back == 0 else 2}
