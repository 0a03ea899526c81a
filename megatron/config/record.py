"""The record of a run that checkpoints keep: Megatron's `args`, one value for every option, under Megatron's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config import equivalents
from megatron.config.architecture import Architecture
from megatron.config.derive import architecture, derive
from megatron.config.parser import SECTIONS, all_options, defaults
from megatron.config.schema import Option, options

_RANK_DEPENDENT = ("local_rank", "dry_run")


def as_namespace(settings: Mapping[str, Any], without_effect: Mapping[str, Any]) -> dict[str, Any]:
    """The record of complete settings, with plain values (as in JSON), sorted by name.

    It has all options of Megatron-DeepSpeed, also those without effect here.
    """
    record = {option.dest: option.default for option in all_options().values()}
    record |= {**without_effect, **settings, **equivalents.mirrors(settings)}
    record["group_query_attention"] = settings["num_key_value_heads"] < settings["num_attention_heads"]
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sorted(record.items())
        if name not in _RANK_DEPENDENT
    }


def from_namespace(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a record of this project, of Megatron-DeepSpeed or of Megatron-LM.

    Values that say nothing here are left out: None, names that are unknown, objects of classes.
    """
    # Megatron-LM records one group where attention has none.
    ignored = {"num_query_groups"} if record.get("group_query_attention") is False else set()
    known = {name: value for name, value in record.items() if name not in ignored and value is not None}
    settings: dict[str, Any] = {}
    for kind in SECTIONS.values():
        for option in options(kind):
            for name in _names(option):
                if name in known and _plain(known[name]):
                    settings.setdefault(option.dest, _value(option, known[name]))
    flags = {row.option.dest: known[row.option.dest] for row in equivalents.EQUIVALENTS if row.option.dest in known}
    expanded, _ = equivalents.expand(flags)
    return {name: value for name, value in expanded.items() if name not in flags} | settings


def architecture_of(record: Mapping[str, Any], vocab_size: int) -> Architecture:
    """The model that a record describes, for a tokenizer that can produce `vocab_size` tokens.

    Raises:
        KeyError: the record lacks a size of the model.
    """
    settings = defaults() | {"world_size": 1} | from_namespace(record)
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if settings[name] is None]
    if missing:
        raise KeyError(f"the record of the run has no {', '.join(missing)}")
    complete, _ = derive(settings, frozenset())
    return architecture(complete, vocab_size)


def _names(option: Option) -> tuple[str, ...]:
    """The names that an option may have in a record, its own first."""
    return (option.dest, *(name.lstrip("-").replace("-", "_") for name in option.names))


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, list, tuple))


def _value(option: Option, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return option.synonyms.get(str(value).lower(), value)
