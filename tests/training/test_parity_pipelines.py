"""Every pipeline trains with the numbers of one process; the whole matrix is in docs/parity.md."""

from __future__ import annotations

import pytest

from tests.parity import PIPELINES, agrees, layout_of

SHORT = 4
QUICK = (("PP2 1f1b", "native stage 1"),)
FURTHER = tuple(
    (layout.name, engine) for layout in PIPELINES for engine in layout.engines if (layout.name, engine) not in QUICK
)


@pytest.mark.parametrize(("layout", "engine"), QUICK)
def test_pipeline_equals_one_process(layout: str, engine: str) -> None:
    assert agrees(layout_of(layout), engine, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "engine"), FURTHER)
def test_every_pipeline_and_engine_equals_one_process(layout: str, engine: str) -> None:
    assert agrees(layout_of(layout), engine, SHORT)
