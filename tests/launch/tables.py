"""Tables of variables for the documentation, one per vendor's script."""

from __future__ import annotations

from megatron.launch.env import PLAIN, Family
from megatron.launch.families import FAMILIES

PAGES = {
    "gaudi.md": ("gaudi-llama", "gaudi-bloom", "gaudi-mixtral"),
    "ascend.md": ("ascend",),
    "trainium.md": ("neuron",),
}
"""Page -> the families that it has a table of, in order."""


def table(family: Family) -> str:
    """A Markdown table of the variables that are not plain ones."""
    plain = {variable.name for variable in PLAIN.variables}
    flags: dict[str, set[str]] = {}
    meaning: dict[str, str] = {}
    for variable in family.variables:
        if variable.name in plain:
            continue
        flags.setdefault(variable.name, set()).update(variable.decides)
        if variable.help:
            meaning[variable.name] = variable.help
    rows = [
        f"| `{name}` | {', '.join(f'`{flag}`' for flag in sorted(flags[name]))} | {meaning[name]} |" for name in flags
    ]
    return "\n".join(["| variable | flag | meaning |", "|---|---|---|", *rows]) + "\n"


def tables(page: str) -> list[str]:
    """The tables of a page, in order."""
    return [table(FAMILIES[name]) for name in PAGES[page]]
