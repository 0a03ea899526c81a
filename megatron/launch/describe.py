"""A plan in words, for `--dry-run` and the first lines of a launch."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator

from megatron.config import dump
from megatron.config.deepspeed import merge
from megatron.config.run import RunConfig
from megatron.launch.forecast import forecast
from megatron.launch.plan import Plan


def variables(plan: Plan) -> Iterator[str]:
    """One line per variable that was read or has a default, with the flags it stands for."""
    for name, group in itertools.groupby(plan.readings, key=lambda reading: reading.name):
        rows = list(group)
        flags = [word for row in rows for word in row.flags]
        notes = [f"no flag: {row.note}" for row in rows if row.note and not row.overridden]
        others = "overridden" if all(row.overridden for row in rows) else (*notes, "(no flag)")[0]
        default = " (default)" if rows[0].is_default else ""
        yield f"{name}={rows[0].value}{default}  ->  {shlex.join(flags) or others}"


def command(plan: Plan) -> str:
    """The command as it can be pasted into a shell."""
    return shlex.join(plan.command)


def everything(plan: Plan, run: RunConfig | None) -> str:
    """Variables, of a run resolved settings, DeepSpeed's JSON, memory and time; exports and the command."""
    parts = [("variables", "\n".join(variables(plan)))]
    if run is not None:
        parts.append(("settings", "\n".join(dump.lines(run))))
    if run is not None and run.deepspeed.deepspeed:
        parts.append(("DeepSpeed JSON", json.dumps(merge(run.deepspeed_document, run), indent=2)))
    if run is not None:
        parts.append(("plan", forecast(plan)))
    exports = [f"{variable.name}={variable.value}  # {variable.why}" for variable in plan.exports]
    parts += [("exported variables", "\n".join(exports)), ("command", command(plan))]
    return "\n\n".join(f"== {title}\n{text}" for title, text in parts if text)
