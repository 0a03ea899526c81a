"""Finds the files of a tokenizer from what `--tokenizer-model` says: a file, a folder or a cached Hugging Face name."""

from __future__ import annotations

import re
from pathlib import Path

from megatron.tokenizer.base import Tokenizer, TokenizerError, read_json, require_file
from megatron.tokenizer.huggingface import load_gpt2_files, load_tokenizer_json
from megatron.tokenizer.pieces import PlainPieces
from megatron.tokenizer.settings import TokenizerSettings

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_huggingface(settings: TokenizerSettings) -> Tokenizer:
    """A tokenizer in Hugging Face's layout.

    In a folder, `tokenizer.json` is taken first, then a SentencePiece `tokenizer.model`, then `vocab.json` with
    `merges.txt`; with `hf_use_fast=False` the SentencePiece model comes first.

    Raises:
        TokenizerError: nothing usable is there.
    """
    if settings.model is None:
        raise TokenizerError(f"{settings.type} needs --tokenizer-model, which was not given")
    path = _locate(settings.model)
    if path.is_file():
        return load_tokenizer_json(path, settings)
    fast, pieces = path / "tokenizer.json", path / "tokenizer.model"
    if fast.is_file() and (settings.hf_use_fast or not pieces.is_file()):
        return load_tokenizer_json(fast, settings)
    if pieces.is_file():
        return _load_pieces(path, settings)
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return load_gpt2_files(vocab, merges, settings)
    found = ", ".join(sorted(file.name for file in path.iterdir())[:20]) or "nothing"
    raise TokenizerError(
        f"--tokenizer-model {settings.model} holds none of tokenizer.json, tokenizer.model, or vocab.json with "
        f"merges.txt (found: {found}). A tokenizer that is Python code of its own is never run: save it as "
        "tokenizer.json with Hugging Face's save_pretrained"
    )


def _locate(model: str) -> Path:
    """The file or folder; a name that is no path is looked up in the local Hugging Face cache."""
    path = Path(model)
    if path.exists():
        return path
    if _HUB_NAME.fullmatch(model):
        from huggingface_hub import try_to_load_from_cache  # A dependency of `tokenizers`; slow to import.

        for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
            found = try_to_load_from_cache(model, name)
            if isinstance(found, str):
                return Path(found).parent
    raise TokenizerError(
        f"--tokenizer-model {model}: no such file or folder, and no model of this name in the local Hugging Face "
        f"cache. Nothing is downloaded here: fetch it first with `hf download {model}`, or give a path"
    )


def _load_pieces(folder: Path, settings: TokenizerSettings) -> Tokenizer:
    """A folder with a SentencePiece model and no `tokenizer.json`, such as those of the first LLaMA models."""
    file = require_file(str(folder / "tokenizer.model"), flag="--tokenizer-model", kind=settings.type)
    added = folder / "added_tokens.json"
    if added.is_file() and read_json(added, flag="--tokenizer-model", expected="a JSON object"):
        raise TokenizerError(
            f"{added} adds tokens that tokenizer.model does not have; save the folder as tokenizer.json with Hugging "
            "Face's save_pretrained, which holds both"
        )
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file, flag="--tokenizer-model", expected="a JSON object") if config_file.is_file() else {}
    include = settings.hf_include_special_tokens
    return PlainPieces(
        file,
        kind=settings.type,
        add_bos=include and bool(config.get("add_bos_token", True)),
        add_eos=include and bool(config.get("add_eos_token", False)),
        eod_token=settings.eod_token,
    )
