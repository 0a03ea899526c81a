"""A trained model and its tokenizer, as a checkpoint of any format describes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.formats import ReadOptions, StoredModel, open_model
from megatron.checkpoint.formats.assets import Assets, read_json
from megatron.checkpoint.formats.lazy import dtype_of
from megatron.config.architecture import Architecture
from megatron.config.record import from_namespace
from megatron.config.tokenizer import TokenizerConfig
from megatron.generation.reading import Reader
from megatron.generation.session import Session
from megatron.model.gpt import GPT
from megatron.mpu.groups import with_kv_copies
from megatron.mpu.sharding import kv_copies
from megatron.tokenizer import Tokenizer, TokenizerError, TokenizerSettings, build_tokenizer, settings_of_run
from megatron.training.pretrained import load_pretrained
from megatron.training.setup import SetupError

_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class TokenizerChoice:
    """What a user says about the tokenizer; None: what the checkpoint says.

    Attributes:
        kind: as in `--tokenizer-type`.
        model: as in `--tokenizer-model`.
    """

    kind: str | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What is needed to continue a text.

    Attributes:
        reader: this rank's part of the model.
        arch: of the whole model.
        tokenizer: of the model.
        ends: tokens that end a text.
    """

    reader: Reader
    arch: Architecture
    tokenizer: Tokenizer
    ends: frozenset[int]


def open_source(
    folder: Path, kind: str | None, options: ReadOptions, choice: TokenizerChoice
) -> tuple[StoredModel, Tokenizer]:
    """Open a checkpoint, and build its tokenizer.

    Args:
        folder: where it is.
        kind: its format; None: what it looks like.
        options: how it is read.
        choice: the tokenizer.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
        TokenizerError: there is no tokenizer, or it is of another model.
    """
    source = open_model(folder, kind, options)
    tokenizer = build_tokenizer(tokenizer_settings(source, choice))
    if tokenizer.vocab_size > source.arch.vocab_size:
        raise TokenizerError(
            f"the tokenizer {tokenizer.name} makes {tokenizer.vocab_size} tokens, but the model in {folder} knows "
            f"{source.arch.vocab_size}: it is of another model. Give the right one with --tokenizer-model"
        )
    return source, tokenizer


def restore(source: StoredModel, tokenizer: Tokenizer, session: Session, *, dtype: torch.dtype | None) -> Restored:
    """The layers of this rank, whatever layout the model was trained in.

    Args:
        source: the checkpoint; this rank reads its part of each tensor.
        tokenizer: of the model.
        session: this rank, its device and kernels.
        dtype: of the weights; None: that of the checkpoint.

    Raises:
        SetupError: there are more pipeline stages than layers.
    """
    groups = with_kv_copies(session.groups, kv_copies(source.arch.num_kv_heads, session.groups.tp.size))
    tp, pp = groups.tp, groups.pp
    if pp.size > source.arch.num_layers:
        raise SetupError(f"--pipeline-model-parallel-size {pp.size}: the model has {source.arch.num_layers} layers")
    rows = -(-source.arch.vocab_size // tp.size) * tp.size
    arch = dataclasses.replace(source.arch, padded_vocab_size=rows)
    stage = GPT(
        arch,
        ops=session.ops,
        groups=groups,
        layers=layers_of(arch.num_layers, pp.rank, pp.size),
        first=pp.rank == 0,
        last=pp.rank == pp.size - 1,
        dtype=dtype or dtype_of(source.weights.records["embedding.word.weight"]),
        device=session.device,
    )
    load_pretrained(stage, source, arch, groups)
    ends = ending_tokens(source.assets, tokenizer)
    return Restored(reader=Reader(stage, arch, groups), arch=arch, tokenizer=tokenizer, ends=ends)


def layers_of(num_layers: int, rank: int, ranks: int) -> range:
    """The layers of a pipeline rank: as many as the others have, or one less."""
    return range(num_layers * rank // ranks, num_layers * (rank + 1) // ranks)


def ending_tokens(assets: Assets, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: those that the model's Hugging Face files name, else the tokenizer's."""
    files = [read_json(assets.files[_GENERATION_CONFIG])] if _GENERATION_CONFIG in assets.files else []
    for config in (*files, assets.config() or {}):
        ends = config.get("eos_token_id")
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset([tokenizer.eod])


def tokenizer_settings(source: StoredModel, choice: TokenizerChoice) -> TokenizerSettings:
    """Which tokenizer a model has: what the user says, else that of the run if it is still there, else a carried one.

    Raises:
        TokenizerError: there is none of them.
    """
    recorded = _recorded(source.settings)
    if choice.kind is not None or choice.model is not None:
        said = {"tokenizer_type": choice.kind, "tokenizer_model": choice.model}
        given = {name: value for name, value in said.items() if value is not None}
        return _settings({"tokenizer_type": "HuggingFaceTokenizer", **recorded, **given})
    carried = source.assets.tokenizer_folder()
    if "tokenizer_type" in recorded and (carried is None or _files_are_there(recorded)):
        return _settings(recorded)
    if carried is None:
        raise TokenizerError(
            "the checkpoint has no tokenizer and does not say where it is: give its file or folder with "
            "--tokenizer-model (and --tokenizer-type, if it is none of Hugging Face's)"
        )
    return _settings({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(carried)})


def _recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a run says about its tokenizer."""
    names = {field.name for field in dataclasses.fields(TokenizerConfig)}
    return {name: value for name, value in from_namespace(settings).items() if name in names}


def _settings(values: Mapping[str, Any]) -> TokenizerSettings:
    return settings_of_run(TokenizerConfig(**values))


def _files_are_there(recorded: Mapping[str, Any]) -> bool:
    paths = (recorded.get(name) for name in ("tokenizer_model", "vocab_file", "merge_file"))
    return all(Path(path).exists() for path in paths if path is not None)
