"""Looking into the model during some iterations: what passes through its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.model.norm import Norm
from megatron.mpu import collectives
from megatron.mpu.groups import Group
from megatron.mpu.local import local


class ReplicasDifferError(ValueError):
    """Ranks that should hold the same numbers do not."""


class Probe(Protocol):
    """Something that looks into the model."""

    def attach(self, model: nn.Module) -> None:
        """Look at this model, or stage of it, from now on."""

    def begin(self, iteration: int) -> None:
        """The next forward passes are of this iteration, counted from 1."""


class TensorLog:
    """Writes what passes through the modules of a model to `tensor_logger_rank_R_iter_N.pt`, one file per iteration.

    A file holds {iteration: {kind: {name of the module: [tensors on the host]}}}, in the order in which they came, for
    every micro-batch. Kinds: "model_inputs", "fwd_act" (outputs), "bwd_grad_out" and "bwd_grad_in" (gradients of
    outputs and inputs). Modules that the model calls through functions of several layers at once (projections with one
    input) are not seen themselves; what surrounds them is.

    Args:
        kinds: some of "model_inputs", "fwd_act", "bwd_grad".
        iterations: that are written.
        folder: for the files.
        rank: of this process.
    """

    def __init__(self, kinds: frozenset[str], iterations: range, folder: Path, rank: int) -> None:
        self._kinds, self._iterations, self._folder, self._rank = kinds, iterations, folder, rank
        self._iteration = 0
        self._tensors: dict[str, dict[str, list[Tensor]]] = {}

    def attach(self, model: nn.Module) -> None:
        """See `Probe`."""
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleDict):
                module.register_forward_hook(self._hook(name or "model", is_model=not name))

    def begin(self, iteration: int) -> None:
        """See `Probe`; writes what came in the iteration before."""
        if self._tensors:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"tensor_logger_rank_{self._rank}_iter_{self._iteration}.pt"
            torch.save({self._iteration: self._tensors}, path)
            self._tensors = {}
        self._iteration = iteration

    def _hook(self, name: str, *, is_model: bool) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._iteration not in self._iterations or not module.training:
                return
            if is_model and "model_inputs" in self._kinds:
                self._keep("model_inputs", name, inputs)
            if "fwd_act" in self._kinds:
                self._keep("fwd_act", name, output)
            if "bwd_grad" in self._kinds:
                for kind, values in (("bwd_grad_in", inputs), ("bwd_grad_out", output)):
                    for tensor in _tensors(values):
                        if tensor.requires_grad:
                            tensor.register_hook(lambda grad, kind=kind: self._keep(kind, name, grad))

        return after

    def _keep(self, kind: str, name: str, values: Any) -> None:
        kept = self._tensors.setdefault(kind, {}).setdefault(name, [])
        kept.extend(tensor.detach().cpu().clone() for tensor in _tensors(values))


class ReplicaCheck:
    """Compares, at every norm layer, what tensor-parallel ranks should have alike, bit by bit.

    Args:
        kinds: "io" (input and output of the layer, and the gradient of the output), "wb" (weight and bias).
        iterations: that are checked.
        group: the tensor-parallel ranks.
    """

    def __init__(self, kinds: frozenset[str], iterations: range, group: Group) -> None:
        self._kinds, self._iterations, self._group = kinds, iterations, group
        self._iteration = 0

    def attach(self, model: nn.Module) -> None:
        """See `Probe`."""
        for name, module in model.named_modules():
            if isinstance(module, Norm) and name.endswith(("attention_norm", "mlp_norm", "final_norm")):
                module.register_forward_hook(self._hook(name))

    def begin(self, iteration: int) -> None:
        """See `Probe`."""
        self._iteration = iteration

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if self._iteration not in self._iterations or not module.training:
                return
            if "wb" in self._kinds:
                for what, parameter in module.named_parameters():
                    self._compare(f"{name}.{what}", local(parameter))
            if "io" in self._kinds:
                self._compare(f"input of {name}", inputs[0])
                self._compare(f"output of {name}", output)
                if output.requires_grad:
                    output.register_hook(lambda grad: self._compare(f"gradient of the output of {name}", grad))

        return after

    def _compare(self, what: str, tensor: Tensor) -> None:
        """Raise the same error on all ranks of the group if their tensors [...] differ.

        Raises:
            ReplicasDifferError: they do.
        """
        ranks = collectives.all_gather(tensor.detach()[None], self._group)
        first = ranks[0]
        different = [rank for rank in range(1, len(ranks)) if not torch.equal(ranks[rank], first)]
        if not different:
            return
        largest = (ranks - first).abs().max().item()
        raise ReplicasDifferError(
            f"--check-tp-norm: iteration {self._iteration}: {what} differs between tensor-parallel ranks "
            f"{self._group.ranks[0]} and {', '.join(str(self._group.ranks[rank]) for rank in different)} by up to "
            f"{largest:.3e}; the norms are {', '.join(f'{part.float().norm().item():.9e}' for part in ranks)}"
        )


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors of a module's input or output."""
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, Tensor):
            yield value
