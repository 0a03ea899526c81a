"""What kind of checkpoint a folder holds, by the names of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron.checkpoint.manifest import MANIFEST

_KINDS: tuple[tuple[str, str, str], ...] = (
    ("native", "a checkpoint of this project", rf"(iter_\d+/)?{re.escape(MANIFEST)}"),
    ("universal", "a universal checkpoint of DeepSpeed", r"([^/]+/)?zero/(optimizer_state\.pt|[^/]+/fp32\.pt)"),
    ("deepspeed", "a checkpoint of DeepSpeed", r"([^/]+/)?[^/]*model_states\.pt"),
    ("megatron", "a checkpoint of Megatron", r"([^/]+/)?mp_rank_\d+(_\d+)*/(model_optim_rng|model_rng)\.pt"),
    ("torch_dist", "a torch_dist checkpoint of Megatron-Core", r"([^/]+/)?(metadata\.json|common\.pt)"),
    (
        "nxd",
        "a checkpoint of NeuronX Distributed",
        r"([^/]+/)?((model/)?(dp_rank_\d+_)?(ep_rank_\d+_)?tp_rank_\d+_pp_rank_\d+(\.pt)?(/checkpoint\.pt)?|checkpoint\.pt)",
    ),
    ("hf", "a model of Hugging Face", r"(model\.safetensors|pytorch_model\.bin)(\.index\.json)?"),
)
_DEPTH = 3
_SHOWN = 6


def kind_of(folder: Path) -> str | None:
    """The format that a folder (or file) looks like; None if like none."""
    found = _match(folder)
    return None if found is None else found[0]


def describe(folder: Path) -> str:
    """What a folder looks like, in words."""
    found = _match(folder)
    if found is not None:
        return f"it looks like {found[1]} (it holds {found[2]})"
    names = sorted(path.name for path in folder.iterdir())[:_SHOWN] if folder.is_dir() else []
    return f"it looks like no checkpoint that is known here (it holds {', '.join(names) or 'nothing'})"


def _match(folder: Path) -> tuple[str, str, str] | None:
    names = sorted(_names(folder))
    for kind, title, pattern in _KINDS:
        for name in names:
            if re.fullmatch(pattern, name):
                return kind, title, name
    return None


def _names(folder: Path, depth: int = _DEPTH, prefix: str = "") -> Iterator[str]:
    """Files below a folder, not deeper than checkpoints are; a single file has the name it has."""
    if folder.is_file():
        yield folder.name
        return
    children: Iterable[Path] = folder.iterdir() if folder.is_dir() else ()
    for path in children:
        name = prefix + path.name
        if path.is_dir() and depth > 1 and not path.name.startswith("."):
            yield from _names(path, depth - 1, f"{name}/")
        yield name
