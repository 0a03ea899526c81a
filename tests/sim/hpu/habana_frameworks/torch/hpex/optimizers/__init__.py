"""SIMULATION of habana_frameworks.torch.hpex.optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from habana_frameworks.torch.core import step_closure
from habana_frameworks.torch.utils.internal import is_lazy


class FusedAdamW(torch.optim.Optimizer):
    """The real one's behaviour: the step is counted per group, the state's own `step` stays 0, eps is not corrected."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        moments_dtype: torch.dtype | tuple[torch.dtype, torch.dtype] | None = None,
    ) -> None:
        if moments_dtype is not None:
            raise NotImplementedError("the simulation has no moments_dtype")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for all parameters with a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            step_closure._mark_step_if_lazy()
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    zeros = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[parameter].update({"step": 0, **zeros})
            if parameters:
                self._update(group, parameters)
        step_closure._mark_step_if_lazy()
        return loss

    def _update(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        group["step"] = group.get("step", 0) + 1
        beta1, beta2 = group["betas"]
        step_size = group["lr"]
        if group.get("bias_correction", True):  # states of torch.optim.AdamW have no such setting
            step_size *= math.sqrt(1.0 - beta2 ** group["step"]) / (1.0 - beta1 ** group["step"])
        first = parameters[0]
        decay = 1.0 - group["weight_decay"] * group["lr"]
        on_device = torch.tensor([decay]).to(first.dtype).to(first.device)
        torch.ops.hpu.optimizer_adamw(
            [parameter.grad.data for parameter in parameters],
            [parameter.data for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            torch.tensor([-step_size]).to(first.dtype).to(first.device),
            beta1,
            beta2,
            group["eps"],
            *((decay,) if is_lazy() else (on_device, decay != 1.0)),
            None,
            None,
        )
