"""AdamW through Gaudi's kernel for many parameters, with the state of torch.optim.AdamW.

The vendor's own `FusedAdamW` counts its steps per group and keeps 0 in the state of each parameter: a checkpoint of one
optimizer then restarts the bias correction of the other. Here `step` is in the state of the parameter and nowhere else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class GaudiAdamW(torch.optim.Optimizer):
    """See `reference.adamw`.

    The kernel adds eps to the root of the second moment before the bias of that is corrected, and would be compiled
    anew for every value of eps. So eps is corrected, too, but to the nearest power of two: in the first steps it is off
    by a factor of at most 1.4, where the vendor's optimizer is off by up to 30, and the kernel is compiled a few times.
    """

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
        from habana_frameworks.torch import core
        from habana_frameworks.torch.utils.internal import is_lazy

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (steps, _), parameters in self._alike(group["params"]).items():
                self._update(group, steps, parameters, lazy=is_lazy())
        if is_lazy():
            core.mark_step()
        return loss

    def _alike(self, parameters: Iterable[Tensor]) -> dict[tuple[int, torch.dtype], list[Tensor]]:
        """Parameters with a gradient by (number of this step, dtype): one call of the kernel each."""
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

    def _update(self, group: dict[str, Any], steps: int, parameters: list[Tensor], *, lazy: bool) -> None:
        beta1, beta2 = group["betas"]
        correction = math.sqrt(1.0 - beta2**steps)
        step_size = group["lr"] * correction / (1.0 - beta1**steps)
        eps = group["eps"] * 2.0 ** round(math.log2(correction))
        kept = 1.0 - group["lr"] * group["weight_decay"]
        weight = _local(parameters[0])
        # As tensors, because the graph or kernel would be compiled anew for every other number.
        factors = torch.tensor([-step_size, kept], dtype=weight.dtype, device="cpu").to(weight.device)
        decay = (kept,) if lazy else (factors[1:], kept != 1.0)
        torch.ops.hpu.optimizer_adamw(
            [_local(parameter.grad) for parameter in parameters if parameter.grad is not None],
            [_local(parameter) for parameter in parameters],
            [_local(self.state[parameter]["exp_avg"]) for parameter in parameters],
            [_local(self.state[parameter]["exp_avg_sq"]) for parameter in parameters],
            factors[:1],
            beta1,
            beta2,
            eps,
            *decay,
            None,
            None,
        )
