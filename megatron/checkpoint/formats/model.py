"""A model between two formats: what every reader gives and every writer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointMismatch
from megatron.checkpoint.formats.assets import Assets
from megatron.checkpoint.formats.lazy import LazyTensors, rows_view
from megatron.config.architecture import Architecture
from megatron.model.gpt import GPT
from megatron.mpu.groups import single_process
from megatron.ops import reference_ops

VOCABULARY = ("embedding.word.weight", "head.weight")
"""Parameters whose rows are tokens."""

_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model that is read while it is written somewhere else.

    Attributes:
        arch: without padding of the vocabulary.
        weights: by logical parameter name, with one row per token that exists.
        moments: state of the optimizer that has the shape of the parameters ("exp_avg", "exp_avg_sq"), by the same
            names; empty if there is none.
        steps: optimizer steps done; None if not known.
        assets: files to carry along.
        settings: the record of the run under Megatron's names, if there is one.
        progress: how far training was, under Megatron's names ("iteration", "consumed_train_samples", ...).
    """

    arch: Architecture
    weights: LazyTensors
    moments: Mapping[str, LazyTensors] = field(default_factory=dict)
    steps: int | None = None
    assets: Assets = field(default_factory=Assets)
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        """Training step after which it was written; 0 if that is not known."""
        return int(self.progress.get("iteration") or 0)

    def vocabulary_rows(self, rows: int) -> dict[str, int]:
        """For `rows_view`: the parameters whose rows are tokens, with that many rows."""
        return {name: rows for name in VOCABULARY if name in self.weights.records}


def unpadded(arch: Architecture) -> Architecture:
    """The same model with one row of the embedding per token that exists."""
    return replace(arch, padded_vocab_size=arch.vocab_size)


def with_vocabulary(model: StoredModel, vocab_size: int) -> StoredModel:
    """The same model for more tokens: the new rows are zero."""
    arch = replace(model.arch, vocab_size=vocab_size, padded_vocab_size=vocab_size)
    rows = model.vocabulary_rows(vocab_size)
    moments = {entry: rows_view(tensors, rows) for entry, tensors in model.moments.items()}
    return replace(model, arch=arch, weights=rows_view(model.weights, rows), moments=moments)


def parameter_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Logical name and shape of every parameter of a model, in the order of the layers."""
    model = GPT(arch, ops=reference_ops(), groups=single_process(), device=torch.device("meta"))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check(model: StoredModel, where: object) -> StoredModel:
    """The model itself, if its tensors are those of its architecture.

    Args:
        model: what was read.
        where: the folder, for messages.

    Raises:
        CheckpointMismatch: tensors are missing, left over or of another shape.
    """
    expected = parameter_shapes(unpadded(model.arch))
    for what, tensors in {"weights": model.weights, **model.moments}.items():
        found = {name: record.shape for name, record in tensors.records.items()}
        faults = [f"{name} is missing" for name in expected if name not in found]
        faults += [f"{name} is not part of the model" for name in found if name not in expected]
        faults += [
            f"{name} is {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ]
        if faults:
            more = f"; and {len(faults) - _NAMES_SHOWN} more" if len(faults) > _NAMES_SHOWN else ""
            raise CheckpointMismatch(
                f"{where}: its {what} do not fit its configuration: {'; '.join(faults[:_NAMES_SHOWN])}{more}"
            )
    return model
