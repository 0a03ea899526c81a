"""Runs an example up to the moment it would start the launcher, and decides the launch in this process.

Bash runs the script for real, with a `python3` that answers which Python to use with a program that writes down how it
was called. So a launch costs milliseconds, and the launcher that reads the environment is the real one.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.launch import describe
from megatron.launch.__main__ import main
from megatron.launch.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
START = {"PATH": os.environ["PATH"], "HOME": "/home/me", "OMP_NUM_THREADS": "1"}
_RECORDER = """#!/bin/sh
env -0 > "$RECORD_IN/environment"
for word in "$@"; do printf '%s\\0' "$word"; done > "$RECORD_IN/words"
"""


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in `folder` for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Launch:
    """What a script asked of the launcher."""

    argv: tuple[str, ...]
    environ: dict[str, str]

    def plan(self, *flags: str) -> Plan:
        """The launch, decided on a machine called n1."""
        with _inside(ROOT):
            return make_plan([*self.argv, *flags, "--dry-run"], self.environ, ("n1",))

    def dry_run(self, *flags: str) -> tuple[int, str, str]:
        """Exit code, output and error output of `python -m megatron.launch ... --dry-run`."""
        out, err = io.StringIO(), io.StringIO()
        with _inside(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*self.argv, *flags, "--dry-run"], self.environ)
        return code, out.getvalue(), err.getvalue()


def launch_of(script: str, folder: Path, *flags: str, **variables: str) -> Launch:
    """What `bash examples/SCRIPT FLAGS` with these variables asks of the launcher; `folder` is empty and temporary."""
    for name, text in (("python3", '#!/bin/sh\necho "$RECORD_IN/python"\n'), ("python", _RECORDER)):
        program = folder / name
        program.write_text(text)
        program.chmod(0o755)
    start = {**START, **variables, "PATH": f"{folder}:{START['PATH']}", "RECORD_IN": str(folder)}
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / script), *flags],
        cwd="/",
        env=start,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    words = (folder / "words").read_text().split("\0")[:-1]
    assert words[:2] == ["-m", "megatron.launch"], words
    lines = (folder / "environment").read_text().split("\0")[:-1]
    environ = dict(line.split("=", 1) for line in lines)
    for name in ("RECORD_IN", "PWD", "SHLVL", "_", "OLDPWD"):
        environ.pop(name, None)
    return Launch(tuple(words[2:]), {**environ, "PATH": START["PATH"]})


def written(launch: Launch) -> str:
    """The launch as text that is the same on every machine: variables, exports and the command."""
    plan = launch.plan()
    exports = [f"{one.name}={one.value}" for one in plan.exports]
    own = {name: value for name, value in sorted(launch.environ.items()) if name not in {*START, "PYTHONPATH"}}
    parts = [
        ("environment", [f"{name}={value}" for name, value in own.items()]),
        ("variables", list(describe.variables(plan))),
        ("exported variables", exports),
        ("command", [describe.command(plan).replace(sys.executable, "python").replace(" --", " \\\n  --")]),
    ]
    text = "\n\n".join(f"== {title}\n" + "\n".join(lines) for title, lines in parts)
    return text.replace(str(ROOT), ".").replace(START["PATH"], "$PATH") + "\n"
