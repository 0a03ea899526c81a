"""The losses of routers in a step: their weight beside the loss of language modelling, and what is reported of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.config.architecture import Architecture
from megatron.model.inputs import Auxiliary
from megatron.model.routing import RoutingPlan
from megatron.mpu.groups import ProcessGroups


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """Figures of a step, or their means over several; the same on every rank.

    Attributes:
        loss: what was added to the loss of language modelling: weighted balance and z losses of all layers.
        balance: mean balance loss of a layer; 1 when every expert gets equally many tokens.
        z: mean z loss of a layer; None where it has no weight.
        dropped: share of the choices (a token with one of its experts) that no expert took.
    """

    loss: float
    balance: float
    z: float | None
    dropped: float


def mean(reports: Sequence[RouterReport]) -> RouterReport:
    """Of at least one report."""
    z = [report.z for report in reports if report.z is not None]
    return RouterReport(
        loss=sum(report.loss for report in reports) / len(reports),
        balance=sum(report.balance for report in reports) / len(reports),
        z=sum(z) / len(z) if z else None,
        dropped=sum(report.dropped for report in reports) / len(reports),
    )


@dataclass(frozen=True, kw_only=True)
class RouterLosses:
    """Routers of a model.

    The mean is taken over the micro-batches of all data-parallel ranks, each a sample of the load: the same ones in
    every layout.

    Attributes:
        layers: number of layers with experts, of the whole model.
        plan: factors of the losses.
        groups: of this process.
        device: of the model.
    """

    layers: int
    plan: RoutingPlan
    groups: ProcessGroups
    device: torch.device

    def begin(self, weight: float) -> Auxiliary:
        """For the forward passes of a step.

        Args:
            weight: of the losses of one micro-batch.
        """
        return Auxiliary(weight=weight, totals=torch.zeros(4, dtype=torch.float32, device=self.device))

    def report(self, auxiliary: Auxiliary, microbatches: int) -> RouterReport:
        """The figures of a step whose backward passes are done. Called by all ranks.

        Args:
            auxiliary: of `begin`.
            microbatches: of this rank.
        """
        totals = self.groups.sum_over_data(self.groups.sum_over_pipeline(auxiliary.totals))
        balance, z, dropped, choices = totals.tolist()
        batches = microbatches * self.groups.dp.size
        return RouterReport(
            loss=(self.plan.balance_coeff * balance + self.plan.z_coeff * z) / batches,
            balance=balance / (batches * self.layers),
            z=z / (batches * self.layers) if self.plan.z_coeff else None,
            dropped=dropped / choices,
        )


def router_losses(
    arch: Architecture, plan: RoutingPlan, groups: ProcessGroups, device: torch.device
) -> RouterLosses | None:
    """Those of a model; None without experts."""
    if arch.experts is None:
        return None
    return RouterLosses(layers=arch.expert_layers, plan=plan, groups=groups, device=device)
