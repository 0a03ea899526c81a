"""The state of a torch optimizer as named tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's state by name: "optimizer.<entry>.<parameter>", for example "optimizer.exp_avg.head.weight".

    The tensors are the state itself: what is loaded into them is what the optimizer continues with. State that the
    optimizer would make at its first step is made here, so the names are the same before and after it. The number of
    steps is kept per parameter ("optimizer.step.<parameter>"), as torch does.

    Args:
        optimizer: Adam, AdamW, SGD or another one whose state is tensors that start at zero; its parameters may be
            `DTensor`s.
        named_parameters: all parameters of the optimizer by their logical names; others are skipped.

    Raises:
        ValueError: a parameter of the optimizer has no name, or a state that is not a tensor.
    """
    names = {parameter: name for name, parameter in named_parameters}
    make_state(optimizer)
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for entry, value in optimizer.state.get(parameter, {}).items():
                if parameter not in names:
                    raise ValueError(f"a parameter of the optimizer, shape {tuple(parameter.shape)}, has no name")
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{entry}.{names[parameter]}"] = value
                elif value is not None:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {entry} of {names[parameter]} as a "
                        f"{type(value).__name__}, which a checkpoint cannot hold: choose another --optimizer"
                    )
    return tensors


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make the state of its first step, and set that back to the moment before it.

    Tensors and numbers become zero. Meanwhile there are gradients of the parameters that have no state yet.
    """
    fresh = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and not optimizer.state.get(parameter)
    ]
    if not fresh:
        return
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in gradients:
        parameter.grad = None
    for parameter in fresh:
        parameter.grad = torch.zeros_like(parameter)
    # At learning rate 0 and with zero gradients a step changes no parameter.
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    for parameter in fresh:
        state = optimizer.state[parameter]
        for entry, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[entry] = type(value)(0)
