"""The tables of variables in the documentation are those of the launcher."""

from __future__ import annotations

import pytest

from tests.launch.recorded import ROOT
from tests.launch.tables import PAGES, tables


@pytest.mark.parametrize("page", PAGES)
def test_page_has_the_tables(page):
    text = (ROOT / "docs" / page).read_text()
    for table in tables(page):
        assert table in text
