"""Commands that the documentation shows, taken apart far enough to be run dry."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

_HARMLESS = {"cat", "cd", "deepspeed", "echo", "export", "git", "head", "ls", "pip", "source", "tail", "tensorboard"}
_PYTHONS = {"python", "python3"}
_TAKES_VALUE = {
    *("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"),
    *("--max-restarts", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),
}


@dataclass(frozen=True)
class Command:
    """One command line of a page: `VARIABLE=value ... program words`."""

    variables: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    @property
    def kind(self) -> str:
        """How it can be tried: script, module, tool, trainer, launch, harmless, or unknown."""
        program, rest = self.words[0], self.words[1:]
        if program in ("bash", "sh"):
            return "script"
        if program == "torchrun":
            return "tool" if self.trainer()[1][0].startswith("tools/") else "trainer"
        if program in _PYTHONS and rest[:2] == ("-m", "megatron.launch"):
            return "launch"
        if program in _PYTHONS and rest[:1] == ("-m",):
            return "module"
        if program in _PYTHONS and rest and re.fullmatch(r"(pretrain|finetune)_\w+\.py", rest[0]):
            return "trainer"
        if program in _PYTHONS and rest and rest[0].endswith(".py"):
            return "tool"
        return "harmless" if program in _HARMLESS else "unknown"

    @property
    def flags(self) -> tuple[str, ...]:
        """The long flags, without those of a launcher."""
        words = self.trainer()[1] if self.words[0] == "torchrun" else self.words
        return tuple(word.partition("=")[0] for word in words if re.match(r"--[a-z]", word))

    def trainer(self) -> tuple[int, tuple[str, ...]]:
        """Number of processes, and the script with its flags, of a `trainer` command or of any under torchrun."""
        words, processes = list(self.words[1:]), 1
        while words and words[0].startswith("-"):
            flag, _, value = words.pop(0).partition("=")
            if flag in _TAKES_VALUE and not value:
                value = words.pop(0)
            if flag == "--nproc-per-node":
                processes = int(value)
        return processes, tuple(words)


def commands(page: str) -> list[Command]:
    """The commands in the bash blocks of a Markdown page, in order."""
    blocks = re.findall(r"^ *```(?:bash|sh)\n(.*?)^ *```", page, flags=re.MULTILINE | re.DOTALL)
    found = []
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            count = 0
            while count < len(words) and re.match(r"[A-Z_][A-Z0-9_]*=", words[count]):
                count += 1
            variables = tuple((name, value) for name, _, value in (word.partition("=") for word in words[:count]))
            if words[count:]:
                found.append(Command(variables, tuple(words[count:])))
    return found
