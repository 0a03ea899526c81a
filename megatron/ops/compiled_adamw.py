"""AdamW for devices that compile a kernel anew for every new number among its arguments.

What changes from step to step (learning rate, bias corrections) reaches the device as a tensor, so that every step runs
what the first one has compiled. The state is that of torch.optim.AdamW: checkpoints pass from one to the other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Local parts of parameters of one dtype that make the same step, and the numbers of that step."""

    weights: list[Tensor]
    gradients: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    betas: tuple[float, float]
    eps: float
    kept: float
    """What weight decay leaves of a weight: 1 - lr * decay."""
    step_size: float
    """Learning rate over the bias correction of the first moment."""
    correction: float
    """Root of the bias correction of the second moment."""

    def on_device(self, *numbers: float) -> Tensor:
        """Numbers as a tensor next to the weights; one copy."""
        like = self.weights[0]
        return torch.tensor(numbers, dtype=like.dtype, device="cpu").to(like.device)


class CompiledAdamW(torch.optim.Optimizer):
    """See `reference.adamw`."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have a gradient; returns what `closure` did."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (steps, _), parameters in self._alike(group["params"]).items():
                self.update(self._batch(group, steps, parameters))
        return loss

    def update(self, batch: Batch) -> None:
        """Update moments and weights, one operation for all tensors at a time."""
        beta1, beta2 = batch.betas
        correction, kept, step = batch.on_device(batch.correction, batch.kept, -batch.step_size)
        torch._foreach_mul_(batch.exp_avg, beta1)
        torch._foreach_add_(batch.exp_avg, batch.gradients, alpha=1 - beta1)
        torch._foreach_mul_(batch.exp_avg_sq, beta2)
        torch._foreach_addcmul_(batch.exp_avg_sq, batch.gradients, batch.gradients, 1 - beta2)
        roots = torch._foreach_sqrt(batch.exp_avg_sq)
        torch._foreach_div_(roots, correction)
        torch._foreach_add_(roots, batch.eps)
        updates = torch._foreach_div(batch.exp_avg, roots)
        torch._foreach_mul_(updates, step)
        torch._foreach_mul_(batch.weights, kept)
        torch._foreach_add_(batch.weights, updates)

    def _alike(self, parameters: Iterable[Tensor]) -> dict[tuple[int, torch.dtype], list[Tensor]]:
        """Parameters with a gradient by (number of this step, dtype)."""
        alike: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            if _local(parameter).numel():
                alike[int(state["step"]), parameter.dtype].append(parameter)
        return alike

    def _batch(self, group: dict[str, Any], steps: int, parameters: list[Tensor]) -> Batch:
        beta1, beta2 = group["betas"]
        return Batch(
            weights=[_local(parameter) for parameter in parameters],
            gradients=[_local(parameter.grad) for parameter in parameters if parameter.grad is not None],
            exp_avg=[_local(self.state[parameter]["exp_avg"]) for parameter in parameters],
            exp_avg_sq=[_local(self.state[parameter]["exp_avg_sq"]) for parameter in parameters],
            betas=(beta1, beta2),
            eps=group["eps"],
            kept=1.0 - group["lr"] * group["weight_decay"],
            step_size=group["lr"] / (1.0 - beta1**steps),
            correction=math.sqrt(1.0 - beta2**steps),
        )
