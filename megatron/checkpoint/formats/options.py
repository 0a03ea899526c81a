"""What a user may say about a conversion besides the two formats."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import sync_folder
from megatron.checkpoint.formats.assets import CONFIG, Assets, read_json
from megatron.checkpoint.formats.settings import architecture_from_record
from megatron.config.architecture import Architecture
from megatron.model.hf_config import architecture_from_hf_config

Style = Literal["grouped", "fused", "coalesced", "separate"]
"""How NxD stores query, key and value: as weight_q, weight_k, weight_v; as weight_qkv; or, of models whose every
query head has a key-value head of its own, as one tensor or as three that are simply cut."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a checkpoint is read.

    Attributes:
        iteration: which of several in a folder; None: the latest.
        config: the model's Hugging Face configuration (`--hf-config`), where the checkpoint does not describe itself.
        arch: the model itself, before anything else that describes it.
        vocab_size: tokens that exist (`--vocab-size`), where the checkpoint does not tell.
        version: of Megatron's format (`--checkpoint-version`), where the checkpoint is wrong about it, see `names`.
        average_replicas: take the mean of copies that should be equal and are not, instead of refusing them.
        optimizer: also read the optimizer's moments.
        tokenizer: file or folder to carry along instead of what is beside the checkpoint.
        query_tiled: order of query heads in a checkpoint of NxD, see `nxd_attention`; None: that of its keys.
        log: told what is worth knowing.
    """

    iteration: int | None = None
    config: Path | None = None
    arch: Architecture | None = None
    vocab_size: int | None = None
    version: float | None = None
    average_replicas: bool = False
    optimizer: bool = True
    tokenizer: Path | None = None
    query_tiled: bool | None = None
    log: Log = print


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a checkpoint is written; a format takes no notice of what it has no place for.

    Attributes:
        tp, pp: tensor- and pipeline-parallel ranks it is split for.
        divisible_by: rows of the embedding are a multiple of this times `tp`; the added rows are zero.
        dtype: of the weights; None: as they are.
        dialect: names of the tensors, of the formats that have several; None: the usual ones.
        max_shard_bytes: largest file of a Hugging Face folder.
        kv_size_multiplier, attention, kv_tiled: see `nxd_attention`; only NxD has them. None: as few copies of
            key-value heads as will do; as NxD's LLaMA has them.
        log: told what is worth knowing.
    """

    tp: int = 1
    pp: int = 1
    divisible_by: int = 128
    dtype: torch.dtype | None = None
    dialect: str | None = None
    max_shard_bytes: int = 5 * 10**9
    kv_size_multiplier: int | None = None
    attention: Style | None = None
    kv_tiled: bool = True
    log: Log = print

    def __post_init__(self) -> None:
        for flag, value in (
            ("--target-tensor-parallel-size", self.tp),
            ("--target-pipeline-parallel-size", self.pp),
            ("--make-vocab-size-divisible-by", self.divisible_by),
            ("--kv-size-multiplier", 1 if self.kv_size_multiplier is None else self.kv_size_multiplier),
        ):
            if value < 1:
                raise CheckpointError(f"{flag} {value}: must be at least 1")

    def padded(self, vocab_size: int) -> int:
        """Rows of the embedding."""
        multiple = self.divisible_by * self.tp
        return -(-vocab_size // multiple) * multiple


def described_architecture(
    options: ReadOptions, assets: Assets, record: Mapping[str, Any], where: Path
) -> Architecture:
    """The architecture of a checkpoint that may describe itself, or not.

    Args:
        options: what it says comes before everything else.
        assets: a carried config.json comes next.
        record: Megatron's arguments in the checkpoint; empty if there are none. The size of the vocabulary in them
            comes before that in the configuration: tokens may have been added.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: nothing describes the model, or not the size of its vocabulary.
    """
    if options.arch is not None:
        return options.arch
    config = _config(options.config) if options.config is not None else assets.config()
    size = options.vocab_size or record.get("original_vocab_size")
    if config is not None:
        try:
            arch = architecture_from_hf_config({**config, "vocab_size": size or config["vocab_size"]})
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{options.config or assets.files[CONFIG]} does not fit: {error!r}") from error
        return arch
    if not record:
        raise CheckpointError(
            f"{where} does not say what model it holds (layers, heads, ...): give --hf-config, the config.json of the "
            "model or the folder it is in"
        )
    if size is None:
        raise CheckpointError(
            f"{where} does not say how many tokens its vocabulary has without padding (padded: "
            f"{record.get('padded_vocab_size')}): give --vocab-size, or --hf-config"
        )
    return architecture_from_record(record, int(size))


def _config(path: Path) -> dict[str, Any]:
    return read_json(path / CONFIG if path.is_dir() else path)


@contextmanager
def new_folder(final: Path) -> Generator[Path]:
    """A folder to write into that appears under its name when all of it is written, or not at all.

    Raises:
        CheckpointError: there is something under that name already.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"--save {final} is there already and not empty: give a new folder, or remove it")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            if path.is_dir():
                sync_folder(path)
        temporary.rename(final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
