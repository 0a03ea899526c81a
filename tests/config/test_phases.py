"""Parts of a run: where they begin, how many steps they have, and how much data they take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron.config.phases import Phase, Phases, phases

LLAMA = phases((1024, 1024, 2048), (0, 61524, 350311035), (4096, 8192, 8192), 8192)


@st.composite
def _phases(draw):
    """Parts whose batches are whole samples of the data."""
    count = draw(st.integers(1, 4))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 60), min_size=count - 1, max_size=count - 1)))]
    pieces = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=count, max_size=count))
    factors = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    return Phases(tuple(Phase(*row) for row in zip(starts, [4 * f for f in factors], pieces, strict=True)))


@given(_phases(), st.integers(0, 150))
def test_counts_are_those_of_walking_through_the_run(parts, samples):
    consumed = read = steps = 0
    while consumed + parts.at(consumed).batch <= samples:
        part = parts.at(consumed)
        consumed, read, steps = consumed + part.batch, read + part.batch // part.pieces, steps + 1
        assert parts.read(consumed) == read and parts.iterations(consumed) == steps
    assert parts.iterations(samples) == steps


def test_a_part_begins_with_the_first_step_that_reaches_it():
    """Steps of 1024 pass 61524 at 62464: the published schedule does not fit its own batch."""
    assert LLAMA.at(61440).pieces == 2 and LLAMA.at(62464) == Phase(61524, 1024, 1)
    assert LLAMA.read(62464) == 62464 // 2 and LLAMA.read(62464 + 1024) == 62464 // 2 + 1024


def test_without_the_flags_there_are_no_parts():
    assert phases(None, None, None, 8) is None
