"""The state of a model that DeepSpeed trains, as named tensors of logical shapes: what checkpoints hold for any engine.

| DeepSpeed's optimizer   | float32 weights and moments of a parameter on this rank                            |
|-------------------------|------------------------------------------------------------------------------------|
| none (stage 0, float32) | the parameter itself                                                               |
| ZeRO 1 and 2, BF16      | elements of a flat tensor for each group of parameters (`parameter._hp_mapping`)   |
| ZeRO 3                  | elements of a flat tensor for each sub-group (`grad_position`), padded at their end |

They are always consecutive elements of the rank's own parameter, row by row. Views of them are saved, and loaded into:
no parameter is gathered, and no more is copied than the box that is being written.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.checkpoint import CheckpointError, CheckpointMismatch, Parts, Place, Stored, make_state
from megatron.checkpoint.ranks import Ranks


@dataclass(frozen=True)
class Range:
    """Where the state of a parameter is: elements [offset, offset + numel) of what the inner optimizer steps.

    Attributes:
        stepped: a parameter of the inner optimizer; its state has the same layout.
        offset, numel: the elements.
        start: number of the first one in this rank's parameter, row by row.
    """

    stepped: Tensor
    offset: int
    numel: int
    start: int

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor with the layout of `stepped`: a view [numel]."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class Layout(Protocol):
    """How one of DeepSpeed's optimizers keeps its state."""

    inner: torch.optim.Optimizer

    def find(self, parameter: Any) -> Range | None:
        """Where the state of a parameter is; None if this rank has no part of it."""
        ...

    def stepping(self) -> AbstractContextManager[None]:
        """While it lasts, the inner optimizer's groups hold what it steps."""
        ...

    def refresh(self) -> None:
        """Bring the parameters that the model computes with up to date with the float32 weights."""
        ...


class _Whole:
    """Every parameter is stepped by itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer

    def find(self, parameter: Any) -> Range | None:
        return Range(parameter, 0, parameter.numel(), 0)

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def refresh(self) -> None:
        pass


class _FlatGroups:
    """ZeRO stages 1 and 2, and the optimizer for bfloat16: a rank has a piece of each flattened group."""

    def __init__(self, optimizer: Any, pieces: list[Tensor]) -> None:
        self.inner, self._optimizer, self._pieces = optimizer.optimizer, optimizer, pieces

    def find(self, parameter: Any) -> Range | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        piece, at = self._pieces[mapping.param_group_index], mapping.get_hp_fragment_address()
        return Range(piece, at.start, at.numel, mapping.lp_fragment_address.start)

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def refresh(self) -> None:
        self._optimizer.update_lp_params()


class _Stage3:
    """ZeRO stage 3: a rank has an equal piece of every parameter."""

    def __init__(self, optimizer: Any) -> None:
        self.inner, self._optimizer = optimizer.optimizer, optimizer

    def find(self, parameter: Any) -> Range | None:
        optimizer = self._optimizer
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * length
        held = min(length, parameter.ds_numel - start)
        return Range(optimizer.fp32_partitioned_groups_flat[group], offset, held, start) if held > 0 else None

    @contextmanager
    def stepping(self) -> Generator[None]:
        self._optimizer._set_fp32_optimizer_param_groups()
        yield
        self._optimizer._clear_fp32_optimizer_param_groups()

    def refresh(self) -> None:
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


def layout_of(optimizer: Any) -> Layout:
    """How the optimizer that `deepspeed.initialize` returned keeps its state.

    Raises:
        CheckpointError: in a way that is not known here.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if getattr(optimizer, "zenflow", False) or getattr(optimizer, "partial_offload", 1.0) < 1.0:
        raise CheckpointError(
            "DeepSpeed's JSON splits the optimizer between host and device (zenflow, or offload_optimizer.ratio below "
            "1), which a checkpoint cannot hold: leave that out"
        )
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Stage3(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _FlatGroups(optimizer, optimizer.single_partition_of_fp32_groups)
    if isinstance(optimizer, BF16_Optimizer):
        return _FlatGroups(optimizer, optimizer.fp32_groups_flat_partition)
    if isinstance(optimizer, torch.optim.Optimizer):
        return _Whole(optimizer)
    raise CheckpointError(f"DeepSpeed trains with its {type(optimizer).__name__}, whose state a checkpoint cannot hold")


class DeepSpeedState:
    """Names the state of DeepSpeed's optimizer, and puts back what is no tensor of it.

    Args:
        optimizer: what `deepspeed.initialize` returned.
        parameters: of the model, by logical name. Those that DeepSpeed marks as copies of a parameter of another
            stage are loaded, and not saved.
        place: from logical name and shape of this rank's parameter to its place in the logical tensor.

    Raises:
        CheckpointError: see `layout_of`.
    """

    def __init__(
        self, optimizer: Any, parameters: Mapping[str, Any], place: Callable[[str, tuple[int, ...]], Place]
    ) -> None:
        self._layout = layout_of(optimizer)
        found = {name: self._layout.find(parameter) for name, parameter in parameters.items()}
        self._ranges = {name: located for name, located in found.items() if located is not None}
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        self._places = {name: place(name, shape) for name, shape in shapes.items()}
        self._copies = {name for name, p in parameters.items() if getattr(p, "ds_pipe_replicated", False)}

    def tensors(self, *, optimizer: bool, saving: bool) -> dict[str, Stored]:
        """What a checkpoint holds, by name. Numbers, such as steps, are float32 scalars, and copies: see `restored`."""
        ranges = {name: at for name, at in self._ranges.items() if not (saving and name in self._copies)}
        tensors = {f"model.{name}": self._parts(name, located.stepped) for name, located in ranges.items()}
        return tensors | (self._optimizer_state(ranges) if optimizer else {})

    def _optimizer_state(self, ranges: Mapping[str, Range]) -> dict[str, Stored]:
        with self._layout.stepping():
            make_state(self._layout.inner)
        tensors: dict[str, Stored] = {}
        for name, located in ranges.items():
            for entry, value in self._layout.inner.state[located.stepped].items():
                if isinstance(value, Tensor) and value.shape == located.stepped.shape:
                    tensors[f"optimizer.{entry}.{name}"] = self._parts(name, value)
                elif value is not None:
                    tensors[f"optimizer.{entry}.{name}"] = torch.tensor(float(value), dtype=torch.float32)
        return tensors

    def _parts(self, name: str, tensor: Tensor) -> Parts:
        located = self._ranges[name]
        return Parts.of_range(located.of(tensor), located.start, self._places[name])

    @torch.no_grad()
    def restored(self, tensors: Mapping[str, Stored]) -> None:
        """Go on with what was loaded into `tensors`. Called by all ranks.

        Raises:
            CheckpointMismatch: on all ranks, if parameters that share a number have different ones.
        """
        numbers = {name: tensor.item() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        Ranks.of(None).each(lambda: self._take(numbers))
        self._layout.refresh()

    def _take(self, numbers: Mapping[str, float]) -> None:
        taken: dict[tuple[Tensor, str], float] = {}
        for name, located in self._ranges.items():
            state = self._layout.inner.state[located.stepped]
            for entry in state:
                if (number := numbers.get(f"optimizer.{entry}.{name}")) is None:
                    continue
                if taken.setdefault((located.stepped, entry), number) != number:
                    raise CheckpointMismatch(
                        f"optimizer.{entry}.{name} is {number:g} in the checkpoint, for other parameters it is "
                        f"{taken[located.stepped, entry]:g}: DeepSpeed has one number for all of them; "
                        "--no-load-optim loads the weights alone"
                    )
                if isinstance(state[entry], Tensor):
                    state[entry].fill_(number)
                else:
                    state[entry] = type(state[entry])(number)
