"""The repository keeps its house rules; checks.py holds what they are."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.architecture import checks
from tests.architecture.checks import Source

ROOT = Path(__file__).resolve().parents[2]
TEXT_SUFFIXES = {"", ".cfg", ".cpp", ".diff", ".h", ".ini", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yml"}
_IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import megatron
for module in pkgutil.walk_packages(megatron.__path__, "megatron."):
    importlib.import_module(module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def _files() -> list[str]:
    """Files under version control and new ones that are not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in set(listed) if (ROOT / name).is_file())


@functools.cache
def _sources(prefix: str = "") -> list[Source]:
    names = [name for name in _files() if name.startswith(prefix) and name.endswith(".py")]
    return [Source(name, (ROOT / name).read_text(encoding="utf-8")) for name in names]


def _expect_none(violations: Iterable[str]) -> None:
    """Fail with one violation per line."""
    found = list(violations)
    if found:
        pytest.fail("\n".join([f"{len(found)} violations:", *found]), pytrace=False)


def test_the_repository_has_files_to_check():
    assert len(_sources("megatron/")) > 10


@pytest.mark.parametrize("check", checks.FILE_CHECKS, ids=lambda check: check.__name__)
def test_house_rule(check):
    _expect_none(violation for source in _sources() for violation in check(source))


def test_nothing_private_is_mentioned():
    texts = [name for name in _files() if Path(name).suffix in TEXT_SUFFIXES]
    sources = [Source(name, (ROOT / name).read_text(encoding="utf-8", errors="replace")) for name in texts]
    _expect_none(violation for source in sources for violation in checks.private_paths(source))


def test_importing_everything_loads_no_optional_package():
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_EVERYTHING], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded_by_torch = {"triton"}  # wherever it is installed
    assert set(done.stdout.split()) & set(checks.VENDOR_PACKAGES) <= loaded_by_torch


@pytest.mark.parametrize("name", ["deepspeed", "transformers"])
def test_packages_that_must_not_load_are_installed(name):
    assert importlib.util.find_spec(name) is not None, "without it the test above shows nothing"


def test_every_setting_is_read():
    sources = [source for source in _sources() if not source.path.startswith("tests/")]
    assert sum(len(checks.settings_of(source)) for source in sources) > 100
    _expect_none(checks.unread_settings(sources))
