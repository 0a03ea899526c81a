"""The command line: all options in one argparse parser, and from words to the settings that were given."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from megatron.config import equivalents
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.device import DeviceConfig
from megatron.config.engine import DeepSpeedConfig
from megatron.config.legacy import LEGACY
from megatron.config.logging import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.moe import MoeConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.precision import PrecisionConfig
from megatron.config.schema import Option, Rejected, options
from megatron.config.tokenizer import TokenizerConfig
from megatron.config.training import TrainingConfig

SECTIONS: Mapping[str, type] = {
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "precision": PrecisionConfig,
    "parallel": ParallelConfig,
    "moe": MoeConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "device": DeviceConfig,
    "deepspeed": DeepSpeedConfig,
}
DRY_RUN = Option(
    dest="dry_run", names=("--dry-run",), kind="switch", default=False, help="Print the resolved settings and stop."
)
_NOT_GIVEN = object()


class ConfigError(ValueError):
    """Settings that contradict each other or cannot be satisfied; `problems` has one sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([message.removeprefix("argument ")])


@functools.cache
def groups() -> Mapping[str, tuple[Option, ...]]:
    """All options: by section, then those without a field."""
    found = {name: options(section) for name, section in SECTIONS.items()}
    found["run"] = (DRY_RUN,)
    found["equivalents"] = equivalents.OPTIONS
    found["legacy"] = tuple(row.option for row in LEGACY)
    return found


@functools.cache
def all_options() -> Mapping[str, Option]:
    """Every option by the name of its setting."""
    return {option.dest: option for group in groups().values() for option in group}


def defaults() -> dict[str, Any]:
    """Every setting with its default; None where it is computed."""
    known = all_options()
    names = [field.name for kind in SECTIONS.values() for field in dataclasses.fields(kind)]
    return {name: known[name].default if name in known and not known[name].required else None for name in names}


def flag_of(setting: str) -> str:
    """The main spelling of the flag of a setting."""
    return all_options()[setting].main


def shown(setting: str, value: Any) -> str:
    """A setting as the words of a command line, with its flag even where no flag gives the value."""
    return " ".join(all_options()[setting].words(value)).replace("=", " ", 1) or flag_of(setting)


@functools.cache
def build_parser(program: str = "pretrain_gpt.py") -> argparse.ArgumentParser:
    """The parser whose help lists every option, with the defaults that Megatron-DeepSpeed documents."""
    parser = _Parser(prog=program, usage="%(prog)s [flag [value ...]] ...", allow_abbrev=False)
    titles = {
        "equivalents": "short forms",
        "legacy": "options of old scripts: some have no effect, some are refused; docs/settings.md lists them",
    }
    for name, group in groups().items():
        added = parser.add_argument_group(titles.get(name, name))
        for option in group:
            for words, settings in _arguments(option):
                hidden = {"help": argparse.SUPPRESS} if name == "legacy" else {}
                added.add_argument(*words, dest=option.dest, **settings | hidden)
    return parser


def _arguments(option: Option) -> Iterator[tuple[Sequence[str], dict[str, Any]]]:
    """The calls of `add_argument` that an option needs."""
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    common = {"default": default, "help": option.help.replace("%", "%%")}
    if option.kind == "switch":
        yield option.names, common | {"action": "store_const", "const": option.sets}
        if option.opposites:
            yield (
                option.opposites,
                common | {"action": "store_const", "const": not option.sets, "help": "The opposite."},
            )
        return
    if option.choices:
        metavar = "{" + ",".join(str(choice) for choice in option.choices) + "}"
    else:
        metavar = {"int": "N", "float": "X", "str": "TEXT", "word": "BOOL"}[option.kind]
    value: dict[str, Any] = common | {"type": option.read, "metavar": metavar}
    if option.kind == "word":
        value |= {"nargs": "?", "const": True}
    elif option.many:
        value |= {"nargs": option.many}
    if option.repeat:
        value |= {"action": "extend", "default": None}
    yield option.names, value


def read(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings that the words of a command line give, and one sentence per word that cannot be understood.

    Raises:
        ConfigError: a flag without its value.
    """
    known = all_options()
    start = {dest: None if option.repeat else _NOT_GIVEN for dest, option in known.items()}
    parsed, rest = build_parser().parse_known_args(list(argv), argparse.Namespace(**start))
    problems = list(_unknown(rest))
    given: dict[str, Any] = {}
    for dest, value in vars(parsed).items():
        if value is _NOT_GIVEN or (value is None and known[dest].repeat):
            continue
        rejected = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Rejected)]
        problems += [str(item) for item in rejected]
        if not rejected:
            given[dest] = tuple(value) if isinstance(value, list) else value
    return given, problems


def _unknown(words: Sequence[str]) -> Iterator[str]:
    """One sentence for each word that no option takes; values behind an unknown flag belong to it."""
    behind_flag = False
    for word in words:
        if word.startswith("-"):
            behind_flag = True
            flag = word.partition("=")[0]
            near = nearest(flag)
            yield f"{flag}: no such flag" + (f"; the nearest is {near}" if near else "")
        elif not behind_flag:
            yield f"{word}: not a flag, and no flag before it takes it"


def nearest(flag: str) -> str:
    """The known flag most like `flag`, or nothing."""
    plain = {name.lstrip("-").replace("_", "-").lower(): name for name in spellings()}
    word = flag.lstrip("-").replace("_", "-").lower()
    found = difflib.get_close_matches(word, plain, n=1)
    return plain[found[0]] if found else ""


def spellings() -> tuple[str, ...]:
    """Every flag in every spelling."""
    return tuple(name for option in all_options().values() for name in option.names + option.opposites)
