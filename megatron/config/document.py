"""Writes docs/settings.md: `python -m megatron.config.document > docs/settings.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from megatron.config import rules
from megatron.config.equivalents import OPTIONS
from megatron.config.legacy import LEGACY, Effect
from megatron.config.parser import SECTIONS, groups, shown
from megatron.config.plugins import PLUGINS
from megatron.config.presets import PRESETS
from megatron.config.schema import Option

_INTRODUCTION = """\
# Settings

Every flag of `pretrain_gpt.py`. This page is generated: `python -m megatron.config.document > docs/settings.md`.

Names, values and defaults are those of Megatron-DeepSpeed; most names of Megatron-LM are accepted beside them. A flag
is obeyed or refused. What no flag says is computed from the rest: a default of "computed" is explained beside it.
`--flag value` and `--flag=value` are the same; flags cannot be shortened. A flag wins over DeepSpeed's JSON file
(unless they contradict each other, which is refused), the file over a preset, a preset over a default.
`--dry-run` prints all settings of a run, with everything computed, and stops.
"""
_TITLES = {
    "model": "Model",
    "tokenizer": "Tokenizer and vocabulary",
    "data": "Data",
    "training": "Training loop",
    "optimizer": "Optimizer and learning rate",
    "precision": "Number formats",
    "parallel": "Layout",
    "moe": "Mixtures of experts",
    "checkpoint": "Saving and loading",
    "logging": "Logging",
    "device": "Device and kernels",
    "deepspeed": "DeepSpeed",
    "run": "Run",
}
_EFFECTS: dict[Effect, tuple[str, str]] = {
    "none": ("Without effect", "Accepted from old scripts; the log says once that they have no effect."),
    "refused": ("Refused", "Refused with the reason, unless given with their default value."),
    "renamed": ("Renamed", "Refused; the message names the flag to use."),
}


def document() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for name, title in _TITLES.items():
        doc = SECTIONS[name].__doc__ if name in SECTIONS else None
        rows = [_row(option, _meaning(option)) for option in groups()[name]]
        parts.append(_table(title, doc or "", ("flag", "value", "default", "meaning"), rows))
    rows = [_row(option, option.help) for option in OPTIONS]
    parts.append(
        _table("Short forms", "Flags for a value of another setting.", ("flag", "value", "default", "meaning"), rows)
    )
    plugins = [
        (f"`{name}`", " ".join(f"`{shown(*item)}`" for item in plugin.settings.items()), plugin.meaning)
        for name, plugin in PLUGINS.items()
    ]
    parts.append(_table("Plugins", "Values of `--plugin`.", ("plugin", "stands for", "meaning"), plugins))
    parts += [_legacy(effect) for effect in _EFFECTS]
    parts.append(_presets())
    return "\n".join(parts)


def _legacy(effect: Effect) -> str:
    title, text = _EFFECTS[effect]
    rows = [
        _row(row.option, f"Use {row.reason}." if effect == "renamed" else row.reason[0].upper() + row.reason[1:] + ".")
        for row in LEGACY
        if row.effect == effect
    ]
    return _table(title, text, ("flag", "value", "default", "reason"), rows)


def _presets() -> str:
    rows = [
        (
            f"`{name}`",
            f"{preset.num_parameters:,}" if preset.num_parameters else "",
            str(preset.settings["num_layers"]),
            str(preset.settings["hidden_size"]),
            f"{preset.settings['num_attention_heads']} / {preset.settings['num_key_value_heads']}",
            str(preset.settings["ffn_hidden_size"]),
            str(preset.settings["max_position_embeddings"]),
            str(preset.vocab_size),
            preset.source,
        )
        for name, preset in PRESETS.items()
    ]
    heads = ("preset", "parameters", "layers", "hidden", "heads / kv", "ffn", "positions", "vocabulary", "source")
    return _table(
        "Presets", "Values of `--preset`. A preset is architecture alone; every flag can change it.", heads, rows
    )


def _row(option: Option, meaning: str) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in option.names)
    if option.opposites:
        names += "; opposite: " + ", ".join(f"`{name}`" for name in option.opposites)
    return names, _value(option), _default(option), meaning


def _meaning(option: Option) -> str:
    waiting = {row.setting: row for row in rules.NOT_YET}
    if option.dest in waiting:
        return f"{option.help} Not implemented yet: any other value is refused."
    return option.help


def _value(option: Option) -> str:
    if option.kind == "switch":
        return ""
    if option.choices:
        text = ", ".join(f"`{choice}`" for choice in option.choices)
    else:
        text = {"int": "whole number", "float": "number", "str": "text", "word": "true or false"}[option.kind]
    limits = list(_limits(option))
    return text + (", " + ", ".join(limits) if limits else "") + ("; several" if option.many else "")


def _limits(option: Option) -> Iterator[str]:
    if option.minimum is not None:
        yield f"at least {option.minimum:g}"
    if option.maximum is not None:
        yield f"at most {option.maximum:g}"


def _default(option: Option) -> str:
    if option.required and option.default is None:
        return "computed" if "Default" in option.help else "none"
    if option.kind == "switch":
        return "off"
    if option.default in (None, "", ()):
        return ""
    if isinstance(option.default, tuple):
        return " ".join(str(item) for item in option.default)
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def _table(title: str, text: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"## {title}", "", *([text, ""] if text else [])]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
