"""Every command in the documentation is run dry: its files exist, its flags are known, its settings resolve."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.launch import env
from megatron.launch.__main__ import main as launch
from tests.architecture.commands import Command, commands
from tests.support import run_script

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
COMMANDS = [
    pytest.param(page.relative_to(ROOT), command, marks=[] if page.name == "README.md" else [pytest.mark.slow])
    for page in PAGES
    for command in commands(page.read_text())
]


def _run(words, variables=()):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MEGATRON_PYTHON": sys.executable, **dict(variables)}
    done = subprocess.run(
        words, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120
    )
    return _printed(done)


def _printed(done):
    words = done.args
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def _help(*start):
    return _run([sys.executable, *start, "--help"]) if start[0] == "-m" else _printed(run_script(*start, "--help"))


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: str(value) if isinstance(value, Path) else "")
def test_command_of_the_documentation(page, command, tmp_path):
    variables = [*command.variables, *_stand_ins(command, tmp_path)]
    arguments = [_existing(word, tmp_path) for word in command.words[1:]]
    if command.kind == "script":
        assert (ROOT / arguments[0]).is_file()
        if arguments[0].startswith("examples/"):
            _run(["bash", *arguments, "--dry-run"], variables)
        else:
            _run(["bash", "-n", arguments[0]])
    elif command.kind == "launch":
        flags = [*arguments[2:], "--dry-run"]
        assert launch(flags, {**os.environ, **dict(variables)}) == 0
    elif command.kind == "trainer":
        processes, words = command.trainer()
        _printed(run_script(*words, "--dry-run", **dict(variables), WORLD_SIZE=str(processes)))
    elif command.kind in ("tool", "module"):
        start = [next(word for word in arguments if word.endswith(".py"))] if command.kind == "tool" else arguments[:2]
        help_text = _help(*start)
        assert [flag for flag in command.flags if flag not in help_text] == []
    else:
        assert command.kind == "harmless", f"the tests do not know how to try {command.words}"


def _existing(word: str, folder: Path) -> str:
    """Text files that the reader is expected to have are made up."""
    if word.endswith(".jsonl") and "/" not in word:
        (folder / word).write_text('{"text": "x"}\n')
        return str(folder / word)
    return word


def _stand_ins(command: Command, folder: Path) -> list[tuple[str, str]]:
    """Files that variables of a documented command name: the reader's own text, and list of machines."""
    result = []
    for name, value in command.variables:
        if name == "DATA_PATH" and value.endswith(".jsonl"):
            result.append((name, _existing(value, folder)))
        elif name == "HOSTFILE":
            (folder / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
            result += [(name, str(folder / "hosts")), ("NODE_RANK", "0")]
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [name for name in targets if "://" not in name and not (page.parent / name).exists()]
    assert missing == []


def test_table_of_variables_is_complete():
    rows = []
    for variable in env.PLAIN.variables:
        if variable.help:
            same_name = [other for other in env.PLAIN.variables if other.name == variable.name]
            flags = ", ".join(f"`{flag}`" for flag in sorted({flag for other in same_name for flag in other.decides}))
            rows.append(f"| `{variable.name}` | {flags} | {variable.help} |\n")
    page = (ROOT / "docs" / "launching.md").read_text()
    assert page.endswith("| variable | flag | meaning |\n|---|---|---|\n" + "".join(rows))


def test_commands_are_taken_apart():
    page = "```bash\n# comment\nA=1 B='x y' python -m megatron.launch \\\n    --lr 1\n$ ls\n```\n```text\nrm x\n```"
    first, second = commands(page)
    assert first == Command((("A", "1"), ("B", "x y")), ("python", "-m", "megatron.launch", "--lr", "1"))
    assert second.words == ("ls",)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("bash a.sh", "script"),
        ("torchrun --nproc-per-node 2 tools/plot_loss.py x", "tool"),
        ("torchrun --nproc-per-node 2 pretrain_gpt.py", "trainer"),
        ("python pretrain_gpt.py --lr 1", "trainer"),
        ("python -m megatron.launch", "launch"),
        ("python -m megatron.ops.check", "module"),
        ("python tools/plot_loss.py", "tool"),
        ("rm -rf x", "unknown"),
    ],
)
def test_kinds_of_commands(line, kind):
    (command,) = commands(f"```bash\n{line}\n```")
    assert command.kind == kind


def test_processes_of_a_trainer_command():
    (command,) = commands("```bash\ntorchrun --nproc-per-node=4 --master-port 1 pretrain_gpt.py --lr 1\n```")
    assert command.trainer() == (4, ("pretrain_gpt.py", "--lr", "1"))
