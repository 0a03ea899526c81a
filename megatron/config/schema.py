"""One description of every setting: the dataclass field, its flags, its help and its place in a saved record.

A section is a frozen dataclass whose fields are made by `option`, `resolved` or `derived`. `options(section)` reads
them back as `Option` values, from which the parser, the help, the documentation and the record of a run are made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["int", "float", "str", "switch", "word"]
Many = Literal["*", "+"]

_OPTION = "option"
_NUMBERS = {"int": "a whole number", "float": "a number"}
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One setting as the command line sees it."""

    dest: str
    names: tuple[str, ...]  # the first is the main spelling
    kind: Kind
    default: Any
    help: str
    opposites: tuple[str, ...] = ()  # switches only: spellings that set the other value
    many: Many | None = None
    repeat: bool = False  # the flag may be given several times, and its values add up
    choices: tuple[Any, ...] = ()
    synonyms: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # lower-case word -> choice
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False  # has no default: computed from other settings where the user gives none

    @property
    def main(self) -> str:
        """The spelling used in messages and documentation."""
        return self.names[0]

    @property
    def sets(self) -> bool:
        """The value that `names` of a switch give."""
        return self.default is not True

    def read(self, text: str) -> Any:
        """The value that a word of the command line stands for, or `Rejected`."""
        if self.kind == "word":
            return _WORDS.get(text.lower(), Rejected(self.main, text, "true or false"))
        value: Any = text
        if self.kind in _NUMBERS:
            try:
                value = int(text) if self.kind == "int" else float(text)
            except ValueError:
                return Rejected(self.main, text, _NUMBERS[self.kind])
            if not math.isfinite(value):
                return Rejected(self.main, text, "a finite number")
        if self.choices and value not in self.choices:
            if text.lower() in self.synonyms:
                return self.synonyms[text.lower()]
            return Rejected(self.main, text, "one of " + ", ".join(str(choice) for choice in self.choices))
        return value

    def outside_limits(self, value: Any) -> str | None:
        """A sentence if a number in `value` is below the minimum or above the maximum."""
        limits = []
        if self.minimum is not None:
            limits.append(f"at least {self.minimum:g}")
        if self.maximum is not None:
            limits.append(f"at most {self.maximum:g}")
        low = -math.inf if self.minimum is None else self.minimum
        high = math.inf if self.maximum is None else self.maximum
        for number in value if isinstance(value, tuple) else (value,):
            if limits and number is not None and not low <= number <= high:
                return f"{self.main} {number}: must be {' and '.join(limits)}"
        return None

    def words(self, value: Any) -> list[str]:
        """The words of a command line that set this option to `value`; none if they cannot."""
        if self.kind == "switch":
            names = self.names if value is self.sets else self.opposites
            return list(names[:1]) if value is not None else []
        if value is None:
            return []
        if self.many:
            return [self.main, *(str(item) for item in value)]
        return [f"{self.main}={value}"]


@dataclass(frozen=True)
class Rejected:
    """A word that an option cannot take. It stands in the place of the value until all problems are reported."""

    flag: str
    text: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.flag} {self.text}: must be {self.allowed}"


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """What `option` was told; the rest of an `Option` comes from the field's name and annotation."""

    help: str
    default: Any
    names: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    opposites: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    synonyms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    many: Many | None = None
    repeat: bool = False
    minimum: float | None = None
    maximum: float | None = None
    words: bool = False
    required: bool = False


def option(default: Any, help: str, name: str | None = None, **rest: Any) -> Any:
    """A field that is a flag.

    Args:
        default: value without the flag. A switch whose default is True needs a `name` such as `--no-x`.
        help: one sentence, naming the unit of a number.
        name: main spelling; without it the field's name with dashes.
        rest: `aliases` and `opposites` (further spellings, same and other value), `choices`, `synonyms`,
            `many` ("*" or "+"), `repeat`, `minimum`, `maximum`, `words` (a bool written as a word: `--x false`).
    """
    spec = _Spec(help=help, default=default, names=(name,) if name else (), **rest)
    return dataclasses.field(default=default, metadata={_OPTION: spec})


def resolved(help: str, name: str | None = None, *, default: Any = None, **rest: Any) -> Any:
    """A flag whose value is computed from the other settings where it is not given; `default` is only documentation."""
    spec = _Spec(help=help, default=default, names=(name,) if name else (), required=True, **rest)
    return dataclasses.field(metadata={_OPTION: spec})


def derived() -> Any:
    """A field that is no flag: always computed from the environment and the other settings."""
    return dataclasses.field()


@functools.cache
def options(section: type) -> tuple[Option, ...]:
    """The flags of a section, in the order of its fields."""
    hints = typing.get_type_hints(section)
    return tuple(
        _option_of(item.name, hints[item.name], item.metadata[_OPTION])
        for item in dataclasses.fields(section)
        if _OPTION in item.metadata
    )


def _option_of(dest: str, annotation: Any, spec: _Spec) -> Option:
    kind, many, choices = _read_annotation(annotation)
    main = spec.names or ("--" + dest.replace("_", "-"),)
    return Option(
        dest=dest,
        names=main + spec.aliases,
        opposites=spec.opposites,
        kind="word" if spec.words else kind,
        default=spec.default,
        help=spec.help,
        many=spec.many or many,
        repeat=spec.repeat,
        choices=spec.choices or choices,
        synonyms={str(choice).lower(): choice for choice in spec.choices or choices} | dict(spec.synonyms),
        minimum=spec.minimum,
        maximum=spec.maximum,
        required=spec.required,
    )


def _read_annotation(annotation: Any) -> tuple[Kind, Many | None, tuple[Any, ...]]:
    """Kind, repetition and choices that a field's type stands for: int, str | None, Literal[...], tuple[int, ...]."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = [part for part in typing.get_args(annotation) if part is not type(None)]
    many: Many | None = None
    if typing.get_origin(annotation) is tuple:
        annotation, many = typing.get_args(annotation)[0], "+"
    choices: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        annotation = type(choices[0])
    kinds: dict[Any, Kind] = {bool: "switch", int: "int", float: "float", str: "str"}
    return kinds[annotation], many, choices
