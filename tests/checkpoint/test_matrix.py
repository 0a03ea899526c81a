"""The matrix of docs/converting.md: it is about what the converter has, and some of its layouts are tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.checkpoint.formats import FORMATS
from tests.checkpoint.matrix import FAMILIES, HEADING, TARGETS, through, write_source

PAGE = Path(__file__).resolve().parents[2] / "docs" / "converting.md"
WITHOUT_PLACE = {"torch_dist": ("BLOOM",)}
"""Format -> families that its programs do not compute."""


def test_the_page_has_the_whole_matrix() -> None:
    assert {target.kind for target in TARGETS.values()} == FORMATS.keys() - {"hf"}
    page = PAGE.read_text(encoding="utf-8")
    assert HEADING in page
    rows = [line.strip("| ").split(" | ") for line in page.split(HEADING)[1].splitlines() if line.startswith("| ")]
    assert rows[0] == list(TARGETS)
    assert [row[0] for row in rows[1:]] == list(FAMILIES)
    for family, *cells in rows[1:]:
        for target, cell in zip(TARGETS, cells, strict=True):
            layouts = len(TARGETS[target].layouts())
            possible = family not in WITHOUT_PLACE.get(target, ())
            assert cell.startswith(f"{layouts} of {layouts},") == possible, cell


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layout_of_each_format(family: str, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "hf")
    for name, target in TARGETS.items():
        if family not in WITHOUT_PLACE.get(name, ()):
            (tmp_path / name).mkdir()
            through(source, target, (2, 1) if len(target.layouts()) > 1 else (1, 1), tmp_path / name)
