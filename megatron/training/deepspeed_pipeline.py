"""Pipelines through DeepSpeed: its `PipelineModule`, whose one "layer" per rank is a whole stage of our model.

DeepSpeed sends what a stage returns to the next one, in its 1F1B order. Positions, documents and labels do not travel:
DeepSpeed takes the micro-batches of every stage one after the other, so a stage finds its own copy of each at the head
of a queue.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.data.batch import Batch
from megatron.model.gpt import GPT
from megatron.model.inputs import Auxiliary
from megatron.mpu.groups import ProcessGroups
from megatron.training.deepspeed import DeepSpeedEngine, import_deepspeed, mark_split_parameters
from megatron.training.engine import StepResult, StepSettings
from megatron.training.loss import TokenLoss, lm_loss
from megatron.training.optimizer import set_schedules
from megatron.training.step import count_tokens, model_inputs
from megatron.training.tied import NAME

_WHOLE = {"pipe_partitioned": False, "grad_partitioned": False}
"""Hidden states are sent as they are: with sequence parallelism tensor-parallel ranks hold different parts already."""


class _Stage(nn.Module):
    """A stage as DeepSpeed calls it: with the output of the stage before alone."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        self.waiting: deque[Batch] = deque()
        self.auxiliary: Auxiliary | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [b, s] or hidden states -> hidden states or logits, see `GPT.forward`."""
        return self.model(x, model_inputs(self.waiting.popleft(), self.auxiliary))


class _Loss:
    """The loss of the last stage as DeepSpeed calls it; keeps the sum of what it has returned, without its weight."""

    def __init__(self, token_loss: TokenLoss) -> None:
        self._token_loss = token_loss
        self.waiting: deque[Batch] = deque()
        self.weight: Tensor | float = 1.0
        self.total: Tensor | float = 0.0

    def __call__(self, logits: Tensor, _: Tensor) -> Tensor:
        """The weighted sum of the losses of a micro-batch: float32 scalar."""
        loss = lm_loss(logits, self.waiting.popleft(), self._token_loss)
        self.total = self.total + loss.detach()
        return loss * self.weight


class DeepSpeedPipelineEngine(DeepSpeedEngine):
    """Trains one stage of a model per pipeline rank; see `Engine` for the methods.

    Args:
        model: the stage of this rank.
        tied: the last stage uses the word embedding of the first one as its head.
        token_loss: of the last stage.
        config, groups, parts: as for `DeepSpeedEngine`, of this stage.
    """

    def __init__(
        self,
        model: GPT,
        *,
        tied: bool,
        token_loss: TokenLoss,
        config: Mapping[str, Any],
        groups: ProcessGroups,
        **parts: Any,
    ) -> None:
        mark_split_parameters(model, groups)
        self._stage, self._loss = _Stage(model), _Loss(token_loss)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology
            module = _pipeline_module(self._stage, self._loss, groups)
        if tied:
            _tie(module, model, groups)
        super().__init__(
            module,
            token_loss=token_loss,
            config={**config, "pipeline": {**config.get("pipeline", {}), **_WHOLE}},
            mpu=None,
            groups=groups,
            **parts,
        )

    def train_step(self, microbatches: Sequence[Batch], settings: StepSettings) -> StepResult:
        """Forward and backward of the micro-batches, then one step of DeepSpeed's optimizer; see `Engine`."""
        set_schedules(self.optimizer, settings)
        self._set_microbatches(len(microbatches))
        scale = self._loss_scale()
        tokens = count_tokens(microbatches, self._groups, self._device)
        self._stage.auxiliary = self._begin_routing(scale, 1.0)
        # DeepSpeed averages over micro-batches and the ranks with the same weights; the sum is wanted.
        self._loss.weight = len(microbatches) * self._groups.dp_cp.size / tokens
        self.engine.train_batch(self._queue(microbatches))
        self._accelerator.end_of_micro_step()
        if self._eight_bit is not None:
            self._eight_bit.after_step()
        return StepResult(
            loss=(self._collect_loss() / tokens).item(),
            grad_norm=float(self.engine.get_global_grad_norm()),
            skipped=not self.engine.was_step_applied(),
            loss_scale=scale,
            router=self._routed(self._stage.auxiliary, len(microbatches)),
        )

    @torch.no_grad()
    def eval_step(self, microbatches: Sequence[Batch]) -> tuple[float, float]:
        """Loss sum and token count over all ranks; see `Engine`."""
        queue = self._queue(microbatches)
        self.engine.eval_batch(queue, reduce_output=None, bcast_loss=False, num_micro_batches=len(microbatches))
        tokens = torch.stack([batch.loss_mask.sum() for batch in microbatches]).sum()
        return self._collect_loss().item(), self._groups.sum_over_data(tokens.to(self._device)).item()

    def _queue(self, microbatches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Let the stage and the loss know the micro-batches; returns what DeepSpeed reads of them."""
        batches = [batch.to(self._device) for batch in microbatches]
        self._loss.total = 0.0
        for waiting in (self._stage.waiting, self._loss.waiting):
            waiting.clear()
            waiting.extend(batches)
        return iter([(batch.tokens, batch.labels) for batch in batches])

    def _collect_loss(self) -> Tensor:
        """Sum of the losses of all ranks."""
        own = torch.as_tensor(self._loss.total, dtype=torch.float32, device=self._device)
        return self._groups.sum_over_data(self._groups.sum_over_pipeline(own))


def _pipeline_module(stage: _Stage, loss: _Loss, groups: ProcessGroups) -> Any:
    """DeepSpeed's module for a pipeline with one stage per rank, in our order of ranks."""
    deepspeed = import_deepspeed()
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    deepspeed.init_distributed(dist_init_required=False)
    topology = groups.topology
    layers = [stage if number == groups.pp.rank else LayerSpec(_Stage) for number in range(topology.pp)]
    return PipelineModule(
        layers,
        topology=PipeModelDataParallelTopology(
            num_pp=topology.pp, num_mp=topology.tp, num_dp=topology.dp * topology.cp
        ),
        loss_fn=loss,
        partition_method="uniform",
    )


def _tie(module: Any, model: GPT, groups: ProcessGroups) -> None:
    """Have DeepSpeed sum the gradients of both ends of the tie, and count one of them in norms."""
    own: dist.ProcessGroup | None = None
    for ranks in groups.topology.groups("pp"):
        ends = [ranks[0], ranks[-1]]
        handle = dist.new_group(ends)
        own = handle if groups.world.rank in ends else own
    if own is None:
        return
    weight: Any = model.get_parameter(NAME)
    weight.ds_pipe_replicated = groups.pp.rank > 0
    module.get_tied_weights_and_groups = lambda: [(weight, own)]
