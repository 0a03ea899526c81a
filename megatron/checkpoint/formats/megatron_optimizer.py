"""The state of Megatron's optimizers in its "torch" format, whose files name no parameter.

- The distributed optimizer (distrib_optim.pt): for every buffer of gradients one flat float32 tensor of weights and of
  each moment, in which the parameters lie in the reverse order of the modules. The start of each is a multiple of 64
  since 2024, and before that follows the one before.
- Any other (in model_optim_rng.pt): torch's numbers, of which a group with weight decay and one without (biases and
  norms) count the parameters in the order of the modules.

That the order is understood is proved: the float32 weights, rounded, must be the weights of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats.lazy import LazyTensors, in_memory
from megatron.checkpoint.formats.megatron_ranks import RankFile, TensorRank
from megatron.checkpoint.formats.merge import is_buffer
from megatron.checkpoint.formats.torch_read import load_torch
from megatron.checkpoint.formats.zero import WEIGHTS

DISTRIBUTED = "distrib_optim.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGNMENTS = (64, 1)
_COMPARED = 64
Entries = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class _Parameter:
    """One of a rank: its full name, its weights in the model, the number of its chunk, whether it is of an expert."""

    name: str
    weights: Tensor
    chunk: int
    of_expert: bool

    @property
    def decays(self) -> bool:
        """Whether Megatron applies weight decay to it."""
        return self.weights.dim() != 1 and not self.name.endswith(".bias")

    def is_rounded(self, master: Tensor) -> bool:
        """Whether these float32 weights are its own, by the first of them."""
        own = self.weights.reshape(-1)[:_COMPARED]
        return torch.equal(master.reshape(-1)[:_COMPARED].to(own.dtype), own)


class _UnknownOrder(Exception):
    """Which part of the state belongs to which parameter does not show."""


def read_optimizer(ranks: Sequence[TensorRank]) -> tuple[dict[str, list[LazyTensors]], int | None]:
    """What the optimizer holds.

    Returns:
        Of the weights ("fp32") and of each moment the tensors of each tensor-parallel rank, by full name; nothing if
        there is no optimizer. And the steps it has done.

    Raises:
        CheckpointError: its order cannot be known.
    """
    found: dict[str, list[LazyTensors]] = {}
    for rank in ranks:
        whole: Entries = {}
        for file in rank.files:
            for entry, tensors in _entries(file).items():
                whole[entry] = {**tensors, **whole.get(entry, {})}
        for entry, tensors in whole.items():
            found.setdefault(entry, []).append(in_memory(tensors))
    return found, _steps(ranks[0].files[0].state.get("optimizer")) if found else None


def _entries(file: RankFile) -> Entries:
    state = file.state.get("optimizer")
    separate = file.path.with_name(DISTRIBUTED)
    parameters = [
        _Parameter(name, tensor, number, name in file.experts)
        for number, chunk in enumerate(file.chunks)
        for name, tensor in chunk.items()
        if not is_buffer(name)
    ]
    try:
        if separate.is_file():
            content = load_torch(separate)
            return _together(_from_buffers, content, parameters)
        if any("params" not in group for group in _groups(state)):
            raise CorruptCheckpoint(
                f"{file.path.parent} has no {DISTRIBUTED}, which holds its optimizer's state; --no-optimizer converts "
                "the weights alone"
            )
        return _together(_from_groups, state, parameters)
    except _UnknownOrder as error:
        raise CheckpointError(
            f"{file.path.parent}: its optimizer's state does not show which part belongs to which parameter ({error}): "
            "save it with --ckpt-format torch_dist, whose optimizer is read, or convert the weights alone with "
            "--no-optimizer"
        ) from error


def _together(read: Any, content: Any, parameters: Sequence[_Parameter]) -> Entries:
    """The state of one optimizer, or of two: for what is no expert, and for the experts of an expert-parallel rank."""
    if not isinstance(content, list):
        return read(content, parameters) if content else {}
    if len(content) > 2:
        raise _UnknownOrder(f"{len(content)} optimizers")
    found: Entries = {}
    for state, of_expert in zip(content, (False, True), strict=False):
        own = [parameter for parameter in parameters if parameter.of_expert == of_expert]
        for entry, tensors in (read(state, own) if state else {}).items():
            found.setdefault(entry, {}).update(tensors)
    return found


def _groups(state: Any) -> Iterator[Mapping[str, Any]]:
    """The groups of parameters of one or more optimizers."""
    for one in state if isinstance(state, list) else [state or {}]:
        yield from one.get("optimizer", one).get("param_groups", ())


def _steps(state: Any) -> int | None:
    for one in state if isinstance(state, list) else [state or {}]:
        inner = one.get("optimizer", one)
        for place in (*inner.get("state", {}).values(), *inner.get("param_groups", ())):
            if place.get("step") is not None:
                return int(place["step"])
    return None


def _from_buffers(state: Mapping[Any, Any], parameters: Sequence[_Parameter]) -> Entries:
    """Of the distributed optimizer."""
    buffers = [
        tensors for index in sorted(key for key in state if isinstance(key, int)) for tensors in state[index].values()
    ]
    owners = [list(own) for own in _of_one_buffer(parameters)]
    if len(buffers) != len(owners):
        raise _UnknownOrder(f"{len(buffers)} buffers for {len(owners)} kinds of parameters")
    found: Entries = {}
    for tensors, own in zip(buffers, owners, strict=True):
        flats = {WEIGHTS: _flat(tensors["param"]), **{entry: _flat(tensors[entry]) for entry in _MOMENTS}}
        places = _places(own, flats[WEIGHTS])
        for entry, flat in flats.items():
            for parameter in own:
                part = flat[places[parameter.name] :][: parameter.weights.numel()]
                found.setdefault(entry, {})[parameter.name] = part.view(parameter.weights.shape)
    return found


def _of_one_buffer(parameters: Iterable[_Parameter]) -> Iterator[Iterable[_Parameter]]:
    """The parameters of each buffer: those of a chunk with the same dtype."""
    for _, chunk in groupby(parameters, lambda parameter: parameter.chunk):
        by_dtype: dict[torch.dtype, list[_Parameter]] = {}
        for parameter in chunk:
            by_dtype.setdefault(parameter.weights.dtype, []).append(parameter)
        yield from by_dtype.values()


def _flat(stored: Tensor | Sequence[Tensor]) -> Tensor:
    """Before February 2024 there was a tensor per bucket."""
    return stored if isinstance(stored, Tensor) else torch.cat(list(stored))


def _places(parameters: Sequence[_Parameter], masters: Tensor) -> dict[str, int]:
    """Where each parameter begins in the flat tensors.

    Raises:
        _UnknownOrder: in no order do the float32 weights fit those of the model.
    """
    for alignment in _ALIGNMENTS:
        places: dict[str, int] = {}
        end = 0
        for parameter in reversed(parameters):
            places[parameter.name] = start = -(-end // alignment) * alignment
            end = start + parameter.weights.numel()
        if end <= masters.numel() and all(
            parameter.is_rounded(masters[places[parameter.name] :][: parameter.weights.numel()])
            for parameter in parameters
        ):
            return places
    raise _UnknownOrder("the buffers were cut in buckets that do not end with a multiple of 64")


def _from_groups(state: Mapping[str, Any], parameters: Sequence[_Parameter]) -> Entries:
    """Of an optimizer that is not distributed."""
    inner = state.get("optimizer", state)
    found: Entries = {}
    if not inner.get("state"):
        return found
    waiting = {decays: iter([p for p in parameters if p.decays == decays]) for decays in (True, False)}
    masters = state.get("fp32_from_fp16_params") or [[]] * len(inner["param_groups"])
    for group, of_group in zip(inner["param_groups"], masters, strict=True):
        own_masters = iter(of_group)
        for number in group["params"]:
            parameter = next(waiting[bool(group.get("wd_mult", group["weight_decay"]))], None)
            if parameter is None:
                raise _UnknownOrder("its groups of parameters are not those with and without weight decay")
            exact = parameter.weights.dtype == torch.float32
            master = parameter.weights if exact else next(own_masters, None)
            tensors = {WEIGHTS: master, **{entry: inner["state"][number].get(entry) for entry in _MOMENTS}}
            for entry, tensor in tensors.items():
                if tensor is None or tensor.shape != parameter.weights.shape:
                    raise _UnknownOrder(f"{entry} of {parameter.name} has another shape")
                found.setdefault(entry, {})[parameter.name] = tensor.detach()
            if not parameter.is_rounded(tensors[WEIGHTS]):
                raise _UnknownOrder(f"the float32 weights of {parameter.name} are not its own")
    if any(next(rest, None) for rest in waiting.values()):
        raise _UnknownOrder("it lacks parameters")
    return found
