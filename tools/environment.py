"""Finds or makes a Python that has this project, for the examples and the tests. Standard library only.

Prints the path of the interpreter to use; everything else goes to the error stream. Taken in this order:

1. ``MEGATRON_PYTHON=/path/to/python``: used as it is.
2. the Python that runs this file, when it already has every package: used as it is, so the torch of a vendor's
   container is never replaced.
3. ``.venv`` in the repository, created and installed with the versions of ``constraints/ci.txt``. A stamp of the files
   that decide what is installed makes the next call return at once.

In the first two cases the C++ extension is built next to its package and nothing is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 10), (3, 13))
_CANDIDATES = ("python3.11", "python3.12", "python3.13", "python3.10")

_LIST_UNMET = """
import sys
from importlib import metadata
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit("packaging is missing")
for text in sys.argv[1:]:
    need = Requirement(text)
    if need.marker and not need.marker.evaluate():
        continue
    try:
        have = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        print(need.name, "is missing")
        continue
    if not need.specifier.contains(have, prereleases=True):
        print(f"{need.name} {have} is not {need.specifier}")
"""

_DESCRIBE = """
import json, sys, sysconfig
print(json.dumps([list(sys.version_info[:2]), sysconfig.get_path("include"), sysconfig.get_config_var("EXT_SUFFIX")]))
"""


class EnvironmentProblem(RuntimeError):
    """Something on this machine is missing; the message says what to install."""


def requirements(pyproject: str, extras: frozenset[str]) -> list[str]:
    """The requirement lines of the project and of `extras`, read from the text of pyproject.toml."""
    lists = re.findall(r"^([\w-]+) = (\[[^\]]*\](?:[^\n]*\])?)", pyproject, flags=re.MULTILINE)
    found = {name: re.findall(r'"([^"]+)"', body) for name, body in lists}
    unknown = sorted(extras - found.keys())
    if unknown:
        raise EnvironmentProblem(f"pyproject.toml has no extra named {', '.join(unknown)}")
    return [line for name in ("dependencies", *sorted(extras)) for line in found[name]]


def fingerprint(files: list[Path]) -> str:
    """A hash of the names and contents of `files`."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_fresh(stamp: Path, inputs: str, extras: frozenset[str]) -> bool:
    """Whether `stamp` says that `inputs` with at least `extras` is what was installed last."""
    try:
        written = json.loads(stamp.read_text())
        return bool(written["inputs"] == inputs and extras <= set(written["extras"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unmet(python: str, needs: list[str]) -> list[str]:
    """What `python` lacks of the requirement lines `needs`, as sentences; empty when nothing is missing."""
    answer = subprocess.run([python, "-c", _LIST_UNMET, *needs], capture_output=True, text=True, check=False)
    lines = answer.stdout.splitlines()
    return lines if answer.returncode == 0 else [*lines, answer.stderr.strip() or f"{python} does not run"]


def _describe(python: str) -> tuple[tuple[int, int], Path, str] | None:
    """Version, folder of the C headers and suffix of extension modules of `python`; None if it does not run."""
    try:
        answer = subprocess.run([python, "-c", _DESCRIBE], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    version, include, suffix = json.loads(answer.stdout)
    return (version[0], version[1]), Path(include), suffix


def _require_compiler(include: Path) -> None:
    compilers = (os.environ.get("CXX") or "", "c++", "g++", "clang++")
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        raise EnvironmentProblem("csrc/ needs a C++17 compiler; install one (Debian and Ubuntu: apt-get install g++)")
    if not (include / "Python.h").exists():
        raise EnvironmentProblem(
            f"csrc/ needs the headers of Python, but {include}/Python.h is missing "
            "(Debian and Ubuntu: apt-get install python3-dev)"
        )


def _run(command: list[str], purpose: str) -> None:
    """Run `command`, its output to the error stream. DeepSpeed must not compile its kernels while it is installed."""
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise EnvironmentProblem(f"{purpose} failed (exit code {done.returncode}); the reason is above")


def _pick_base() -> str:
    """The Python that the virtual environment is made from."""
    for candidate in (sys.executable, *_CANDIDATES):
        described = _describe(candidate)
        if described and SUPPORTED[0] <= described[0] <= SUPPORTED[1]:
            return candidate
    low, high = (".".join(map(str, version)) for version in SUPPORTED)
    raise EnvironmentProblem(f"this project needs Python {low} to {high}; {sys.executable} is {sys.version.split()[0]}")


def _own_environment(extras: frozenset[str]) -> str:
    """The interpreter of .venv, created or brought up to date."""
    folder = ROOT / ".venv"
    python, stamp = str(folder / "bin" / "python"), folder / "megatron-stamp.json"
    constraints = ROOT / "constraints" / "ci.txt"
    decisive = [ROOT / "pyproject.toml", ROOT / "setup.py", constraints, *(ROOT / "csrc").glob("*")]
    inputs = fingerprint(decisive)
    described = _describe(python)
    if described and is_fresh(stamp, inputs, extras):
        return python
    if not described:
        base = _pick_base()
        print(f"creating {folder} with {base}", file=sys.stderr)
        _run([base, "-m", "venv", "--clear", str(folder)], "python -m venv (Debian and Ubuntu: python3-venv)")
        described = _describe(python)
    if described is None:
        raise EnvironmentProblem(f"{python} does not run; remove {folder} and try again")
    _require_compiler(described[1])
    print(f"installing into {folder} (a minute or two)", file=sys.stderr)
    target = f".[{','.join(sorted(extras))}]" if extras else "."
    install = [python, "-m", "pip", "install", "--quiet", "--no-input", "--constraint", str(constraints)]
    _run([*install, "--editable", target], "pip install")
    stamp.write_text(json.dumps({"inputs": inputs, "extras": sorted(extras)}))
    _mark_built(described[2])  # an editable install builds in place
    return python


def _build_in_place(python: str) -> None:
    """Build the C++ extension beside its package, unless it is there and made from these sources."""
    described = _describe(python)
    if described is None:
        raise EnvironmentProblem(f"{python} does not run")
    _, include, suffix = described
    built = ROOT / "megatron" / "data" / f"_index_builder{suffix}"
    if built.exists() and is_fresh(_extension_stamp(suffix), _extension_inputs(), frozenset()):
        return
    _require_compiler(include)
    _run([python, "setup.py", "--quiet", "build_ext", "--inplace", "--force"], "building csrc/")
    _mark_built(suffix)


def _extension_stamp(suffix: str) -> Path:
    return ROOT / "build" / f"extension{suffix}.json"


def _extension_inputs() -> str:
    return fingerprint([ROOT / "setup.py", *(ROOT / "csrc").glob("*")])


def _mark_built(suffix: str) -> None:
    stamp = _extension_stamp(suffix)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(json.dumps({"inputs": _extension_inputs(), "extras": []}))


def prepare(extras: frozenset[str]) -> str:
    """The path of an interpreter that has the project with `extras`, installed or built if need be."""
    needs = requirements((ROOT / "pyproject.toml").read_text(), extras)
    asked = os.environ.get("MEGATRON_PYTHON")
    if asked:
        missing = unmet(asked, needs)
        if missing:
            raise EnvironmentProblem(f"MEGATRON_PYTHON={asked} lacks: {'; '.join(missing)}")
    inside_own = Path(sys.prefix) == ROOT / ".venv"
    found = asked or (None if inside_own or unmet(sys.executable, needs) else sys.executable)
    if found is None:
        return _own_environment(extras)
    _build_in_place(found)
    return found


def main() -> int:
    """Command line: print the interpreter to use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--extras", default="", help="extras of pyproject.toml, comma separated: test,hf,plot")
    arguments = parser.parse_args()
    try:
        print(prepare(frozenset(filter(None, arguments.extras.split(",")))))
    except EnvironmentProblem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
