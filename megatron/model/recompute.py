"""What happens to activations between the forward and the backward pass: kept, computed again, or moved to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megatron.mpu.local import local

Granularity = Literal["none", "selective", "mlp", "full"]


class Span(NamedTuple):
    """Neighbouring layers of a stage that are treated as one.

    Attributes:
        layers: their numbers, from 0 in each stage.
        again: they are computed again in backward; their input alone is kept.
        on_host: what they keep lies on the host.
    """

    layers: range
    again: bool
    on_host: bool


@dataclass(frozen=True, kw_only=True)
class RecomputePlan:
    """Which activations are recomputed in backward instead of being kept, and which are kept on the host.

    Attributes:
        granularity: "none"; "selective" = the attention core (scores, softmax, weighted sum) of every layer; "mlp" =
            the feed-forward block of every layer; "full" = whole layers, keeping only their inputs.
        method: with "full": "uniform" recomputes all layers in chunks of `num_layers`, keeping one input per chunk;
            "block" recomputes the first `num_layers` layers of each pipeline stage and keeps the rest.
        num_layers: see `method`; with "block" also one number for every stage.
        host_inputs: inputs that are kept for recomputation lie on the host.
        host_layers: the first layers of each stage, of which everything that is kept lies on the host.
        pinned: the host's memory is page-locked, from which the device copies faster.
    """

    granularity: Granularity = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int | tuple[int, ...] = 1
    host_inputs: bool = False
    host_layers: int = 0
    pinned: bool = False

    def __post_init__(self) -> None:
        numbers = self.num_layers if isinstance(self.num_layers, tuple) else (self.num_layers,)
        if min(numbers) < (1 if self.method == "uniform" else 0):
            raise ValueError(f"--recompute-num-layers is {min(numbers)}; it must be at least 1")

    def of_stage(self, stage: int) -> RecomputePlan:
        """The plan of one pipeline stage, with one number of layers."""
        return replace(self, num_layers=self.num_layers[stage]) if isinstance(self.num_layers, tuple) else self

    def spans(self, layers: int) -> list[Span]:
        """The layers of a stage that has `layers` of them, in order."""
        assert isinstance(self.num_layers, int)
        size, again = 1, 0
        if self.granularity == "full" and self.method == "uniform":
            size, again = self.num_layers, layers
        elif self.granularity == "full":
            again = self.num_layers
        return [
            Span(range(at, min(at + size, layers)), at < again, at < (again if self.host_inputs else self.host_layers))
            for at in range(0, layers, size)
        ]

    def layers_again(self, stage_layers: Sequence[int]) -> int:
        """How many layers run again as a whole, over all stages; `stage_layers`: layers of each."""
        spans = [span for stage, layers in enumerate(stage_layers) for span in self.of_stage(stage).spans(layers)]
        return sum(len(span.layers) for span in spans if span.again)


def recompute_plan(settings: Mapping[str, Any], *, pinned: bool = False) -> RecomputePlan:
    """What the settings of a run ask for; `pinned`: the device copies faster from page-locked memory."""
    return RecomputePlan(
        granularity=settings["recompute_granularity"] or "none",
        method=settings["recompute_method"] or "uniform",
        num_layers=settings["recomputation_layer_num"] or settings["recompute_num_layers"],
        host_inputs=settings["checkpoint_in_cpu"],
        host_layers=settings["cpu_offloading_num_layers"],
        pinned=pinned,
    )


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function`; of what it computes backward needs, nothing is kept but the arguments.

    No state of random generators is saved: dropout seeds them itself, see `mpu.random`.
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def kept_on_host(weights: Iterable[Tensor], side: Iterable[Tensor | None], *, pinned: bool) -> saved_tensors_hooks:
    """A context in which what operations keep for backward goes to the host, and comes back when it is needed.

    Args:
        weights: parameters, which stay where they are.
        side: other tensors that do.
        pinned: use page-locked memory.
    """
    weights, others = list(weights), [tensor for tensor in side if tensor is not None]

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        # Asked each time: FSDP gathers weights into new memory.
        staying = {_memory(local(weight)) for weight in weights} | {_memory(other) for other in others}
        if _memory(tensor) in staying:
            return tensor
        if not pinned:
            return tensor.device, tensor.cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=pinned)

    return saved_tensors_hooks(pack, unpack)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
