"""Runs the micro-batches of a step through the stages of this rank, in the order of a pipeline schedule.

Without a pipeline there is one stage and nothing to send. With one, hidden states go to the next stage and their
gradients come back; everything else that a stage needs (positions, documents, labels) it takes from its own copy of
the micro-batch. Memory for what is received is taken when the sender has it, and freed when it has been used.

Legend: s=sequence, b=micro-batch, h=hidden, t=tensor-parallel ranks; hidden states are [s, b, h], or [s/t, b, h] with
sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron.data.batch import Batch
from megatron.model.gpt import GPT
from megatron.model.inputs import Auxiliary
from megatron.mpu.collectives import Pending, start_receive, start_send
from megatron.mpu.deferred import WeightTask
from megatron.mpu.groups import ProcessGroups
from megatron.mpu.pipeline import StageLayout
from megatron.mpu.schedule import Receive, ScheduleName, Task, order_tasks, with_receives
from megatron.training.loss import TokenLoss, lm_loss
from megatron.training.step import model_inputs

Place = tuple[int, int]
"""Stage and micro-batch."""


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """How the work is cut and ordered."""

    layout: StageLayout
    schedule: ScheduleName
    hidden_size: int
    hidden_dtype: torch.dtype
    """Of the hidden states between stages."""
    sequence_split: int
    """Ranks that share a sequence between layers: t with sequence parallelism, else 1."""


class Pipeline:
    """The stages of this rank.

    Args:
        stages: by number; parts of one model.
        settings: see there.
        groups: this process's groups.
        token_loss: of the last stage.
        device: of the stages.
        before_backward: called before each backward computation of a stage with the stage and whether it is the step's
            last one.
        after_backward: called after each.
    """

    def __init__(
        self,
        stages: Mapping[int, GPT],
        settings: PipelineSettings,
        *,
        groups: ProcessGroups,
        token_loss: TokenLoss,
        device: torch.device,
        before_backward: Callable[[GPT, bool], None],
        after_backward: Callable[[], None],
    ) -> None:
        self.stages = stages
        self.settings = settings
        self.groups = groups
        self.token_loss = token_loss
        self.device = device
        self.before_backward = before_backward
        self.after_backward = after_backward
        self._plans: dict[tuple[int, bool], list[Task | Receive]] = {}

    def train(self, microbatches: Sequence[Batch], weight: Tensor, auxiliary: Auxiliary | None = None) -> Tensor:
        """Forward and backward of the micro-batches.

        Args:
            microbatches: of this data-parallel rank.
            weight: what the losses are multiplied by for the gradients; float32 scalar.
            auxiliary: what becomes of the losses of routers.

        Returns:
            Sum of the losses of their unmasked tokens, in nats: float32 scalar, the same on all pipeline ranks.
        """
        return self._run(microbatches, weight, auxiliary)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Batch]) -> Tensor:
        """Forward of the micro-batches; the same result as `train`."""
        return self._run(microbatches, None)

    def _run(
        self, microbatches: Sequence[Batch], weight: Tensor | None, auxiliary: Auxiliary | None = None
    ) -> Tensor:
        for stage in self.stages.values():
            stage.train(weight is not None)
        batches = [batch.to(self.device, non_blocking=True) for batch in microbatches]
        step = _Step(self, batches, weight, auxiliary)
        step.run(self._plan(len(microbatches), training=weight is not None))
        return self.groups.sum_over_pipeline(step.loss)

    def _plan(self, microbatches: int, *, training: bool) -> list[Task | Receive]:
        """What this rank does, in order."""
        key = (microbatches, training)
        if key not in self._plans:
            layout = self.settings.layout
            orders = order_tasks(self.settings.schedule, layout, microbatches)
            if not training:
                orders = [[task for task in tasks if task.kind == "F"] for tasks in orders]
            self._plans[key] = with_receives(orders, layout, self.groups.pp.rank)
        return self._plans[key]


class _Step:
    """The work of one step, and what is on its way between stages."""

    def __init__(
        self, pipeline: Pipeline, batches: Sequence[Batch], weight: Tensor | None, auxiliary: Auxiliary | None
    ) -> None:
        self.loss = torch.zeros((), dtype=torch.float32, device=pipeline.device)
        self._pipeline, self._layout = pipeline, pipeline.settings.layout
        self._batches, self._weight, self._auxiliary = batches, weight, auxiliary
        self._hidden: dict[Place, Pending] = {}
        """Inputs of stages, which have arrived or will."""
        self._gradients: dict[Place, Pending] = {}
        """The same of the gradients of their outputs."""
        self._graphs: dict[Place, tuple[Tensor, GradientEdge]] = {}
        """Input of a stage and where its backward computation begins."""
        self._tasks: dict[Place, list[WeightTask]] = {}
        """What is left of backward computations."""
        self._sent: dict[tuple[int, str], Pending] = {}
        """The last thing sent to a rank in a direction."""

    def run(self, plan: Sequence[Task | Receive]) -> None:
        """Do the work."""
        work = {"F": self._forward, "B": self._backward, "I": self._backward_of_input, "W": self._backward_of_weights}
        for step in plan:
            if isinstance(step, Receive):
                self._receive(step.task)
            else:
                work[step.kind](step.stage, step.microbatch)
        for pending in self._sent.values():
            pending.wait()

    def _forward(self, number: int, microbatch: int) -> None:
        stage, batch = self._pipeline.stages[number], self._batches[microbatch]
        x = batch.tokens
        if number > 0:
            x = self._hidden.pop((number, microbatch)).wait().requires_grad_(self._weight is not None)
        output = stage(x, model_inputs(batch, self._auxiliary))
        if number == self._layout.last:
            output = lm_loss(output, batch, self._pipeline.token_loss)
            self.loss += output.detach()
        else:
            self._deliver(output.detach(), self._hidden, number, number + 1, microbatch)
        if self._weight is not None:
            self._graphs[number, microbatch] = (x, get_gradient_edge(output))

    def _backward(self, number: int, microbatch: int) -> None:
        self._differentiate(number, microbatch, completes=True)

    def _backward_of_input(self, number: int, microbatch: int) -> None:
        """The backward computation with gradients of weights left for later."""
        deferred = self._pipeline.stages[number].deferred
        self._differentiate(number, microbatch, completes=deferred is None)
        if deferred is not None:
            self._tasks[number, microbatch] = deferred.take()

    def _backward_of_weights(self, number: int, microbatch: int) -> None:
        """What `_backward_of_input` left."""
        stage = self._pipeline.stages[number]
        if stage.deferred is None:
            return
        self._pipeline.before_backward(stage, self._is_last(microbatch))
        stage.weight_gradients(self._tasks.pop((number, microbatch))).backward()
        self._pipeline.after_backward()

    def _differentiate(self, number: int, microbatch: int, *, completes: bool) -> None:
        """Compute gradients; `completes`: all that the stage gets from this micro-batch."""
        x, edge = self._graphs.pop((number, microbatch))
        gradient = self._weight
        if number < self._layout.last:
            gradient = self._gradients.pop((number, microbatch)).wait()
        assert gradient is not None
        self._pipeline.before_backward(self._pipeline.stages[number], completes and self._is_last(microbatch))
        torch.autograd.backward(edge, gradient)
        if number > 0:
            assert x.grad is not None
            self._deliver(x.grad, self._gradients, number, number - 1, microbatch)
        self._pipeline.after_backward()

    def _is_last(self, microbatch: int) -> bool:
        """Whether a stage has gradients of all micro-batches after this one: they come in order."""
        return microbatch == len(self._batches) - 1

    def _deliver(self, tensor: Tensor, where: dict[Place, Pending], stage: int, to_stage: int, microbatch: int) -> None:
        """Give a result of a stage to a neighbouring one."""
        group, receiver = self._pipeline.groups.pp, self._layout.rank_of(to_stage)
        if receiver == group.rank:
            where[to_stage, microbatch] = Pending(tensor)
            return
        # What was sent before has been received by now or soon is: see `with_receives`.
        link = (receiver, "up" if to_stage > stage else "down")
        if link in self._sent:
            self._sent.pop(link).wait()
        self._sent[link] = start_send(tensor, group, receiver)

    def _receive(self, task: Task) -> None:
        """Get ready for what a task of this rank needs from another one."""
        tokens, settings = self._batches[task.microbatch].tokens, self._pipeline.settings
        samples, length = tokens.shape
        shape = (length // settings.sequence_split, samples, settings.hidden_size)
        buffer = torch.empty(shape, dtype=settings.hidden_dtype, device=tokens.device)
        where, source = (self._hidden, -1) if task.kind == "F" else (self._gradients, 1)
        sender = self._layout.rank_of(task.stage + source)
        where[task.stage, task.microbatch] = start_receive(buffer, self._pipeline.groups.pp, sender)
