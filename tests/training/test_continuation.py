"""Some pairs of the matrix in docs/parity.md, drawn by lot; `python -m tests.continuation` goes through all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.continuation import PAIRS, End, draw, tolerance, worst
from tests.parity import write_section

NUMBER, SEED = int(os.environ.get("CONTINUATION_PAIRS", "3")), os.environ.get("CONTINUATION_SEED", "1")


@pytest.mark.slow
@pytest.mark.parametrize(("save", "resume"), draw(NUMBER, SEED), ids=lambda end: end.name)
def test_losses_go_on_as_if_there_had_been_no_break(save: End, resume: End, tmp_path: Path) -> None:
    """CONTINUATION_SEED=2 draws others, CONTINUATION_PAIRS=10 more."""
    assert worst(save, resume, tmp_path) <= tolerance(save, resume)


def test_pairs_are_all_that_was_promised() -> None:
    assert len(set(PAIRS)) == len(PAIRS) >= 24
    engines = {(save.flags[:1] == ("--deepspeed",), resume.flags[:1] == ("--deepspeed",)) for save, resume in PAIRS}
    assert len(engines) == 4
    assert {end.device for pair in PAIRS for end in pair} == {"cpu", "hpu", "npu", "neuron"}


def test_a_chapter_takes_the_place_of_its_older_self(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_section(page, "# First\n\ntext\n", ["| a |"])
    write_section(page, "## Second\n", ["| b |"])
    write_section(page, "# First\n\nnew\n", ["| c |"])
    assert page.read_text() == "# First\n\nnew\n\n| c |\n\n## Second\n\n| b |\n"
