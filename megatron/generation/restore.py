"""A trained model and its tokenizer, as a checkpoint describes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron import checkpoint
from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats.native import architecture_of
from megatron.config.architecture import Architecture
from megatron.config.record import from_namespace
from megatron.config.tokenizer import TokenizerConfig
from megatron.model.gpt import GPT
from megatron.mpu.groups import single_process
from megatron.ops import Ops
from megatron.tokenizer import Tokenizer, TokenizerSettings, build_tokenizer, settings_of_run


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What is needed to continue a text."""

    model: GPT
    arch: Architecture
    tokenizer: Tokenizer
    iteration: int


def restore(
    root: Path,
    *,
    iteration: int | None,
    tokenizer_model: str | None,
    ops: Ops,
    device: torch.device,
    log: Callable[[str], None],
) -> Restored:
    """The whole model in one process, whatever layout it was trained in.

    Args:
        root: folder of the run's checkpoints.
        iteration: which checkpoint; None: the latest.
        tokenizer_model: where the tokenizer is now; None: where it was during training.
        ops: the kernels.
        device: where the model is to be.
        log: told what is loaded.

    Raises:
        CheckpointError: there is no checkpoint, or not one of tensors.
        TokenizerError: the tokenizer is not where it was.
    """
    record = checkpoint.read_record(root, iteration=iteration)
    if record is None:
        raise CheckpointError(f"--load {root}: there is no checkpoint")
    arch = architecture_of(record.run["architecture"])
    settings = tokenizer_of(record.run["settings"])
    if tokenizer_model is not None:
        settings = dataclasses.replace(settings, model=tokenizer_model)
    model = GPT(arch, ops=ops, groups=single_process(), device=device)
    into = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    checkpoint.load(root, into=into, iteration=iteration, sections={"model"}, vocab_size=arch.vocab_size, log=log)
    return Restored(model=model, arch=arch, tokenizer=build_tokenizer(settings), iteration=record.iteration)


def tokenizer_of(settings: Mapping[str, Any]) -> TokenizerSettings:
    """The tokenizer settings in the record of a run."""
    known = from_namespace(settings)
    names = {field.name for field in dataclasses.fields(TokenizerConfig)}
    return settings_of_run(TokenizerConfig(**{name: value for name, value in known.items() if name in names}))
