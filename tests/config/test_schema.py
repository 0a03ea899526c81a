from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from megatron.config.parser import SECTIONS, all_options, groups
from megatron.config.schema import Option, Rejected, derived, option, options, resolved


@dataclass(frozen=True, kw_only=True)
class _Section:
    count: int = option(3, "A number of things.", minimum=1)
    ratio: float | None = option(None, "A ratio.", maximum=1)
    shape: Literal["Round", "square"] = option("square", "A shape.", synonyms={"circle": "Round"})
    quick: bool = option(False, "Quick.", opposites=("--no-quick",))
    use_bias: bool = option(True, "No bias.", "--disable-bias")
    absent: bool | None = option(None, "Of three states.")
    word: bool = option(False, "A word.", words=True)
    ranks: tuple[int, ...] = option((), "Ranks.")
    total: int = resolved("A total.", aliases=("--sum",))
    world: int = derived()


def _of(dest: str) -> Option:
    return {item.dest: item for item in options(_Section)}[dest]


def test_fields_become_options():
    assert [item.dest for item in options(_Section)] == [
        *("count", "ratio", "shape", "quick", "use_bias", "absent", "word", "ranks", "total")
    ]
    assert _of("count") == Option(
        dest="count", names=("--count",), kind="int", default=3, help="A number of things.", minimum=1
    )
    assert _of("ratio").kind == "float" and _of("ratio").default is None
    assert _of("shape").choices == ("Round", "square")
    assert _of("ranks").many == "+" and _of("ranks").kind == "int"
    assert _of("total").names == ("--total", "--sum") and _of("total").required


def test_a_resolved_field_has_no_default():
    with pytest.raises(TypeError, match="total"):
        _Section(world=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("dest", "text", "value"),
    [
        ("count", "1_000", 1000),
        ("count", "-3", -3),
        ("ratio", "1e-3", 1e-3),
        ("ratio", "2", 2.0),
        ("shape", "ROUND", "Round"),
        ("shape", "Circle", "Round"),
        ("word", "False", False),
        ("word", "0", False),
        ("word", "1", True),
        ("word", "true", True),
    ],
)
def test_words_are_read(dest, text, value):
    assert _of(dest).read(text) == value


@pytest.mark.parametrize(
    ("dest", "text", "message"),
    [
        ("count", "2.5", "--count 2.5: must be a whole number"),
        ("ratio", "half", "--ratio half: must be a number"),
        ("ratio", "nan", "--ratio nan: must be a finite number"),
        ("shape", "oval", "--shape oval: must be one of Round, square"),
        ("word", "maybe", "--word maybe: must be true or false"),
    ],
)
def test_wrong_words_are_rejected(dest, text, message):
    rejected = _of(dest).read(text)
    assert isinstance(rejected, Rejected)
    assert str(rejected) == message


def test_limits_name_the_flag_the_value_and_what_is_allowed():
    assert _of("count").outside_limits(0) == "--count 0: must be at least 1"
    assert _of("count").outside_limits(1) is None
    assert _of("ratio").outside_limits(1.5) == "--ratio 1.5: must be at most 1"
    assert _of("ratio").outside_limits(None) is None


@pytest.mark.parametrize(
    ("dest", "value", "words"),
    [
        ("count", 5, ["--count=5"]),
        ("ratio", None, []),
        ("quick", True, ["--quick"]),
        ("quick", False, ["--no-quick"]),
        ("use_bias", False, ["--disable-bias"]),
        ("use_bias", True, []),
        ("absent", None, []),
        ("absent", True, ["--absent"]),
        ("word", False, ["--word=False"]),
        ("ranks", (1, 2), ["--ranks", "1", "2"]),
    ],
)
def test_values_become_words(dest, value, words):
    assert _of(dest).words(value) == words


def test_every_setting_has_one_place():
    names = [option.dest for group in groups().values() for option in group]
    assert len(names) == len(set(names)) == len(all_options())


def test_every_spelling_belongs_to_one_option():
    spellings = [name for option in all_options().values() for name in option.names + option.opposites]
    assert len(spellings) == len(set(spellings))


def test_sections_cannot_be_changed():
    for kind in SECTIONS.values():
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]


def test_switches_that_start_on_have_a_name_that_turns_them_off():
    for kind in SECTIONS.values():
        for item in options(kind):
            if item.kind == "switch" and item.default is True:
                assert item.main.startswith(("--no-", "--disable-")), item


UNITS = (
    *("iteration", "sample", "token", "layer", "head", "element", "rank", "minute", "factor", "fraction", "row"),
    *(
        "probability",
        "per step",
        "weights",
        "variance",
        "epoch",
        "expert",
        "entries",
        "processes",
        "checkpoint",
        "level",
    ),
    *("position", "stage", "an id", "without unit", "own unit", "root of"),
)


def test_numbers_have_units():
    for kind in SECTIONS.values():
        for item in options(kind):
            if item.kind in ("int", "float"):
                assert any(unit in item.help.lower() for unit in UNITS), f"{item.main}: {item.help}"


def test_help_is_a_sentence():
    for kind in SECTIONS.values():
        for item in options(kind):
            assert item.help[0].isupper() or item.help.split()[0].rstrip(":") in _values(item), item
            assert item.help.endswith("."), item


def _values(item: Option) -> set[str]:
    """Help may begin with a name from the command line."""
    return {str(choice) for choice in item.choices} | {"auto", "true", "adam", "residual"}


def test_defaults_are_allowed_values():
    for item in all_options().values():
        if item.default is not None and not isinstance(item.default, tuple):
            assert item.outside_limits(item.default) is None
            assert not item.choices or item.default in item.choices
    assert dataclasses.is_dataclass(Option)
