"""Prompts of a command: from its arguments, from a file or from standard input, the same on every rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megatron.generation.text import PromptError

_KEYS = ("prompt", "text")


def read_prompts(given: Sequence[str], file: Path | None, standard_input: IO[str]) -> list[str]:
    """All prompts, in order.

    Args:
        given: on the command line.
        file: with one prompt per line, or if it is called *.jsonl, one JSON object with "prompt" (or "text") per line.
            "-": lines of standard input. None: no file.
        standard_input: what "-" reads.

    Raises:
        PromptError: there is no prompt, or the file cannot be read.
    """
    prompts = [*given, *([] if file is None else _in_file(file, standard_input))]
    if not prompts:
        raise PromptError("there is no prompt: give --prompt TEXT, or --prompts FILE (- for standard input)")
    return prompts


def _in_file(file: Path, standard_input: IO[str]) -> list[str]:
    if str(file) == "-":
        return [line.rstrip("\n") for line in standard_input if line.strip()]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"--prompts {file} cannot be read: {error}") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if file.suffix != ".jsonl":
        return [line for _, line in filled]
    return [_prompt_of(line, f"--prompts {file}, line {number}") for number, line in filled]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where} is not JSON: {error}") from error
    found = [record[key] for key in _KEYS if isinstance(record, dict) and isinstance(record.get(key), str)]
    if not found:
        raise PromptError(f'{where} must be a JSON object with a text under "prompt" (or "text")')
    return str(found[0])


def from_first_rank(prompts: Sequence[str] | None) -> list[str]:
    """The prompts of rank 0, on every rank: a launcher gives standard input to none of the others."""
    shared = [prompts]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    return list(shared[0] or ())
