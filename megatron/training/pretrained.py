"""Weights from elsewhere at the beginning of a run, and a Hugging Face folder at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint import CheckpointError, list_checkpoints
from megatron.checkpoint.formats import FORMATS, ReadOptions, StoredModel, WriteOptions, convert, open_model
from megatron.checkpoint.formats.detect import kind_of
from megatron.checkpoint.formats.model import VOCABULARY, unpadded
from megatron.checkpoint.formats.settings import OF_THE_RUN, complete_record, differences
from megatron.checkpoint.location import is_url
from megatron.config.architecture import Architecture
from megatron.model.weights import fill_parameters
from megatron.mpu.groups import ProcessGroups
from megatron.training.report import Printer


def pretrained_kind(load: str | None) -> str | None:
    """The format of what `--load` names; None if it is a checkpoint of this project, or nothing.

    Args:
        load: the folder.
    """
    if load is None or is_url(load) or list_checkpoints(load):
        return None
    kind = kind_of(Path(load))
    return None if kind == "native" else kind


def open_pretrained(load: str, kind: str, iteration: int | None, *, finetune: bool) -> StoredModel:
    """Open the weights that a run is to begin with.

    Args:
        load: the folder.
        kind: its format.
        iteration: which checkpoint in it; None: the latest.
        finetune: whether it is clear that only the weights are wanted.

    Raises:
        CheckpointError: it is a checkpoint of another program, whose training would not be continued.
    """
    if kind != "hf" and not finetune:
        raise CheckpointError(
            f"--load {load}: a checkpoint of {FORMATS[kind].title}, of which a run can take the weights alone "
            "(--finetune); to continue its training, convert it first with tools/convert_checkpoint.py --to native"
        )
    return open_model(Path(load), kind, ReadOptions(iteration=iteration, optimizer=False))


def load_pretrained(model: nn.Module, source: StoredModel, arch: Architecture, groups: ProcessGroups) -> None:
    """Fill the parameters of this rank, each from the part of the tensor that it needs.

    Args:
        model: a model or stage, as for `initialise_parameters`.
        source: the weights.
        arch: of the model.
        groups: this process's groups.

    Raises:
        CheckpointError: the weights are of another model, or of a smaller vocabulary.
    """
    given = source.arch
    wanted = replace(
        unpadded(arch), max_positions=arch.max_positions if arch.position == "learned" else given.max_positions
    )
    different = differences(wanted, given, ignored=OF_THE_RUN)
    if arch.vocab_size > given.vocab_size:
        different.append(f"the tokenizer makes {arch.vocab_size} tokens, not {given.vocab_size}")
    if different:
        raise CheckpointError(
            f"--load: the weights are of another model than the flags describe: {'; '.join(different)} "
            "(--use-checkpoint-args takes the model from the weights)"
        )

    def part(name: str, _: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
        tensor = source.weights.read(name)
        if name not in VOCABULARY:
            return tensor[index]
        start, stop = index[0].start, index[0].stop
        rows = tensor[min(start, arch.vocab_size) : min(stop, arch.vocab_size)]
        return torch.cat((rows, rows.new_zeros(stop - start - rows.shape[0], rows.shape[1])))

    fill_parameters(model, groups, part)


def pretrained_settings(load: str, kind: str, iteration: int | None) -> dict[str, Any]:
    """The record of settings that describes weights from elsewhere, with their tokenizer if they have one."""
    source = open_pretrained(load, kind, iteration, finetune=True)
    tokenizer: Mapping[str, Any] = {}
    if kind == "hf" and source.assets.has_tokenizer():
        tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": load}
    return complete_record(source.arch, source.settings, tokenizer)


def check_export(folder: str) -> None:
    """Find out at start-up, not hours later, whether `--save-hf` can be written.

    Raises:
        CheckpointError: there is something under that name already.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"--save-hf {folder} is there already and not empty: give a new folder, or remove it")


def export(save: str, iteration: int, folder: str, dtype: torch.dtype, say: Printer) -> None:
    """Write a checkpoint of this project as a Hugging Face folder. Called by one rank; it holds one tensor at a time.

    Args:
        save: folder of the run's checkpoints.
        iteration: which of them.
        folder: what to write.
        dtype: of the weights there.
        say: told about it.

    Raises:
        CheckpointError: Hugging Face has no such model, or the folder is there already.
    """
    model = open_model(Path(save), "native", ReadOptions(iteration=iteration, optimizer=False, log=say))
    convert(model, "hf", Path(folder), WriteOptions(dtype=dtype, log=say))
    say(f"  wrote the model of iteration {iteration} to {folder}")
