"""The interpreter that examples and tests run with: what it needs, and when it counts as up to date."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import environment

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_requirements_of_the_project_and_of_extras():
    plain = environment.requirements(PYPROJECT, frozenset())
    assert any(line.startswith("torch>=") for line in plain)
    assert not any(line.startswith("pytest") for line in plain)
    with_tests = environment.requirements(PYPROJECT, frozenset({"test"}))
    assert set(plain) < set(with_tests) and any(line.startswith("pytest>=") for line in with_tests)


def test_unknown_extra_is_refused():
    with pytest.raises(environment.EnvironmentProblem, match="no extra named tests"):
        environment.requirements(PYPROJECT, frozenset({"tests"}))


def test_this_interpreter_meets_what_it_meets():
    have = importlib.metadata.version("numpy")
    assert environment.unmet(sys.executable, ["numpy", f"numpy=={have}"]) == []
    assert environment.unmet(sys.executable, ["numpy>9999"]) == [f"numpy {have} is not >9999"]
    assert environment.unmet(sys.executable, ["no-such-distribution"]) == ["no-such-distribution is missing"]
    assert environment.unmet(sys.executable, ["no-such-distribution; python_version < '3'"]) == []


def test_stamp_says_whether_inputs_and_extras_are_installed(tmp_path):
    stamp = tmp_path / "stamp"
    assert not environment.is_fresh(stamp, "a", frozenset())
    stamp.write_text("broken")
    assert not environment.is_fresh(stamp, "a", frozenset())
    stamp.write_text(json.dumps({"inputs": "a", "extras": ["hf", "test"]}))
    assert environment.is_fresh(stamp, "a", frozenset({"test"}))
    assert not environment.is_fresh(stamp, "b", frozenset({"test"}))
    assert not environment.is_fresh(stamp, "a", frozenset({"plot"}))


def test_fingerprint_changes_with_content_and_name(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("x")
    before = environment.fingerprint([one])
    one.write_text("y")
    assert environment.fingerprint([one]) != before
    other.write_text("y")
    assert environment.fingerprint([one]) != environment.fingerprint([other])


def test_interpreter_that_lacks_packages_is_refused(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    bare.chmod(0o755)
    command = [sys.executable, str(ROOT / "tools" / "environment.py")]
    done = subprocess.run(
        command, env={"MEGATRON_PYTHON": str(bare), "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert f"MEGATRON_PYTHON={bare} lacks" in done.stderr


def test_constraints_pin_every_requirement_exactly():
    lines = (ROOT / "constraints" / "ci.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    assert all("==" in line for line in lines if not line.startswith("#"))
    needs = environment.requirements(PYPROJECT, frozenset({"test", "hf", "plot"}))
    assert {need.partition(">")[0].partition("=")[0] for need in needs} <= pinned
