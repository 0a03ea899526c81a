from __future__ import annotations

from pathlib import Path

from megatron.config.document import document
from megatron.config.parser import spellings
from megatron.config.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == document(), "run: python -m megatron.config.document > docs/settings.md"


def test_the_page_has_every_flag_and_every_preset():
    text = document()
    for name in (*spellings(), *PRESETS):
        assert f"`{name}`" in text, name
