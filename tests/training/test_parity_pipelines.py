"""Every pipeline trains with the numbers of one process; the whole matrix is in docs/parity.md."""

from __future__ import annotations

import pytest

from tests.parity import PIPELINES, SHORT, agrees, layout_of
from tests.training.test_parity import CHUNKED

QUICK = (("PP2 1f1b", "native stage 1"),)
WITHOUT_LOGITS = "PP4 1f1b, tied embeddings"
"""The last stage has the losses, by the embedding of the first."""
FURTHER = tuple(
    (layout.name, engine) for layout in PIPELINES for engine in layout.engines if (layout.name, engine) not in QUICK
)


@pytest.mark.parametrize(("layout", "engine"), QUICK)
def test_pipeline_equals_one_process(layout: str, engine: str) -> None:
    assert agrees(layout_of(layout), engine, SHORT)


def test_losses_without_logits_are_tried() -> None:
    assert WITHOUT_LOGITS in {layout.name for layout in PIPELINES}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "engine"), FURTHER)
def test_every_pipeline_and_engine_equals_one_process(layout: str, engine: str) -> None:
    assert agrees(layout_of(layout), engine, SHORT, CHUNKED if layout == WITHOUT_LOGITS else ())
