"""The table of devices names tests that exist, and the page is made from it."""

from __future__ import annotations

from tests import support_table


def test_every_named_test_exists():
    assert support_table.missing() == []


def test_the_page_is_up_to_date():
    assert support_table.PAGE.read_text() == support_table.page(), "python -m tests.support_table writes it anew"


def test_every_kind_of_evidence_is_explained():
    used = {support_table.evidence(d, t) for f in support_table.FEATURES for d, t in f.tests.items()}
    assert used == set(support_table.EVIDENCE)
