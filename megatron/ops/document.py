"""Writes docs/kernels.md: `python -m megatron.ops.document > docs/kernels.md`."""

from __future__ import annotations

import sys

from megatron import accelerators
from megatron.ops import reference
from megatron.ops.registry import ON_REQUEST, OPERATIONS, REFERENCE, implementations

_INTRODUCTION = f"""\
# Kernels

Every implementation of every [operation](ops.md), as `--op operation=implementation` takes them. This page is
generated: `python -m megatron.ops.document > docs/kernels.md`.

A device in bold takes the implementation without being asked, unless the machine lacks something for it, as
`python -m megatron.ops.check` says. Each operation has `{REFERENCE}`, too: its definition in plain torch.
"""


def document() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *map(_chapter, OPERATIONS)])


def _chapter(op: str) -> str:
    lines = [f"## {op}", "", _first_line(getattr(reference, op).__doc__), ""]
    if op in ON_REQUEST:
        lines += [f"Without being asked for: {ON_REQUEST[op]}.", ""]
    devices: dict[tuple[str, str], list[str]] = {}
    for device in map(accelerators.load, accelerators.DEVICES):
        for place, candidate in enumerate(implementations(device, op)[:-1]):
            key = candidate.name, _first_line(candidate.function.__doc__)
            default = place == 0 and op not in ON_REQUEST
            devices.setdefault(key, []).append(f"**{device.name}**" if default else device.name)
    if devices:
        rows = [f"| `{name}` | {', '.join(where)} | {what} |" for (name, what), where in devices.items()]
        lines += ["| implementation | devices | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0].replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(document())
