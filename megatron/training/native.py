"""The native engine: PyTorch's own distributed stack (DTensor, FSDP2, DCP).

Parameters are DTensors that know how they are split over tensor-parallel ranks. For the data-parallel axis
`fully_shard` (FSDP2) keeps float32 master weights, computes in the model's dtype and reduces gradients:

| stage | parameters            | gradients              | optimizer state |
|-------|-----------------------|------------------------|-----------------|
| 0     | replicated            | all-reduced            | replicated      |
| 1     | gathered once a step  | reduce-scattered once  | sharded         |
| 2     | gathered once a step  | reduce-scattered at every micro-batch | sharded |
| 3     | gathered when used    | reduce-scattered at every micro-batch | sharded |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from megatron import checkpoint
from megatron.accelerators.base import Accelerator
from megatron.checkpoint import Loaded, Place, Stored, TrainingState
from megatron.data.batch import Batch
from megatron.model.gpt import GPT
from megatron.model.weights import place_of
from megatron.mpu.eight_bit import EightBitScaling
from megatron.mpu.groups import ProcessGroups
from megatron.ops import ClipFunction
from megatron.training import gradients
from megatron.training.engine import LoadSource, SaveTarget, StepResult, StepSettings
from megatron.training.half import HalfWeights
from megatron.training.loss import TokenLoss
from megatron.training.loss_scale import LossScale
from megatron.training.optimizer import set_schedules
from megatron.training.pipeline import Pipeline, PipelineSettings
from megatron.training.router_losses import RouterLosses, RouterReport
from megatron.training.shard_experts import placement_over, sharded_modules
from megatron.training.step import count_tokens
from megatron.training.tied import TiedEmbedding


@dataclass(frozen=True, kw_only=True)
class NativeSettings:
    """What the native engine is asked to do."""

    stage: int
    """0-3, see the table of this module."""
    dtype: torch.dtype
    """Of the forward and backward computation; master weights and optimizer state are float32."""
    reduce_dtype: torch.dtype
    """Of the gradients while they are summed over micro-batches and data-parallel ranks."""
    clip_grad: float
    """Largest global gradient norm; 0 = no clipping."""
    loss_scale: LossScale
    count_zeros: bool = False


def shard_data_parallel(
    model: nn.Module, blocks: Iterable[nn.Module], groups: ProcessGroups, s: NativeSettings
) -> bool:
    """Apply FSDP2 to the blocks and to what remains of the model; False where that is not for it.

    A rank that holds them alone has nothing to shard or to reduce; where there are no meshes, there is no FSDP2.
    Stages of a pipeline in 16 bits are still wrapped: schedules that compute weight gradients later write them past the
    hooks that `HalfWeights` needs.
    """
    if groups.mesh is None:
        return False
    if groups.dp_cp.size == 1 and (groups.pp.size == 1 or s.dtype == torch.float32):
        return False
    policy = MixedPrecisionPolicy(param_dtype=s.dtype, reduce_dtype=s.reduce_dtype, cast_forward_inputs=False)
    for module, mesh in sharded_modules(blocks, model, groups):
        sharded = fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=s.stage == 3,
            shard_placement_fn=placement_over(mesh.size(1)),
        )
        # Losses are divided by all tokens, so gradients are summed; and not every device's collectives can average.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "weight_gradients")
    return True


class NativeEngine:
    """Trains a model whose parameters are DTensors; see `Engine` for the methods."""

    def __init__(
        self,
        stages: Mapping[int, GPT],
        *,
        parameters: Mapping[str, nn.Parameter],
        pipeline: PipelineSettings,
        tied: TiedEmbedding | None,
        half: HalfWeights | None,
        eight_bit: EightBitScaling | None,
        clip_grad_norm: ClipFunction,
        token_loss: TokenLoss,
        vocab_size: int,
        optimizer: torch.optim.Optimizer,
        groups: ProcessGroups,
        accelerator: Accelerator,
        device: torch.device,
        settings: NativeSettings,
        router: RouterLosses | None = None,
    ) -> None:
        self.optimizer, self._router = optimizer, router
        self.loss_scale = settings.loss_scale
        self._stages, self._parameters, self._tied, self._half = stages, parameters, tied, half
        self._eight_bit, self._clip_grad_norm = eight_bit, clip_grad_norm
        self._pipeline = Pipeline(
            stages,
            pipeline,
            groups=groups,
            token_loss=token_loss,
            device=device,
            before_backward=self._synchronize_gradients,
            after_backward=accelerator.end_of_micro_step,
        )
        self._vocab_size = vocab_size
        self._groups = groups
        self._device = device
        self._settings, self._cut_graph = settings, accelerator.end_of_micro_step
        self._copies = {name: gradients.copies_of(name, parameter, groups) for name, parameter in parameters.items()}

    def train_step(self, microbatches: Sequence[Batch], settings: StepSettings) -> StepResult:
        """Forward and backward of the micro-batches, then one step of the optimizer; see `Engine`."""
        loss, routed = self._accumulate_gradients(microbatches)
        if self._eight_bit is not None:
            self._eight_bit.after_step()
        copies = self._by_copies(gradients.gradients(self._parameters))
        zeros = self._count_zeros(copies)
        scale = self.loss_scale
        norm = self._clip(copies, scale.value)
        overflow = not math.isfinite(norm)
        skipped = overflow or not loss <= settings.highest_loss
        if not skipped:
            self._step_optimizer(settings)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale = scale.after(overflow=overflow)
        return StepResult(
            loss=loss, grad_norm=norm, skipped=skipped, loss_scale=scale.value, num_zeros=zeros, router=routed
        )

    def eval_step(self, microbatches: Sequence[Batch]) -> tuple[float, float]:
        """Loss sum and token count over all ranks; see `Engine`."""
        loss = self._pipeline.evaluate(microbatches)
        self._reshard()
        tokens = torch.stack([batch.loss_mask.sum() for batch in microbatches]).sum().to(self._device)
        loss_sum, token_sum = self._groups.sum_over_data(torch.stack([loss, tokens])).tolist()
        return loss_sum, token_sum

    def parameters_norm(self) -> float:
        """L2 norm of all parameters; see `Engine`."""
        copies = self._by_copies(self._parameters)
        return math.sqrt(self._groups.sum_over_ranks(gradients.square_sum(copies, self._device)).item())

    def save(self, target: SaveTarget, iteration: int, progress: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Write a checkpoint that any layout can read; see `Engine`."""
        tensors = self._tensors(optimizer=target.optimizer)
        if target.heal and target.saver.heal(tensors):
            self._refresh()
        state = TrainingState(
            tensors=tensors,
            progress={**progress, "loss_scale": self.loss_scale.state()},
            run=run,
            vocab_size=self._vocab_size,
        )
        target.saver.save(iteration, state)

    def load(self, source: LoadSource, *, optimizer: bool, log: Callable[[str], None]) -> Loaded | None:
        """Restore weights and optimizer state from a checkpoint of any layout; see `Engine`."""
        if self._eight_bit is not None:
            self._eight_bit.forget()
        loaded = checkpoint.load(
            source.root,
            into=self._tensors(optimizer=optimizer),
            iteration=source.iteration,
            sections=None if optimizer else {"model"},
            vocab_size=self._vocab_size,
            verify=source.verify,
            fallback=source.fallback,
            log=log,
            progress=source.progress,
        )
        if loaded is not None:
            self._refresh()
            if self._eight_bit is not None:
                self._eight_bit.refresh()
        if loaded is not None and optimizer:
            self.loss_scale = self.loss_scale.resumed(loaded.progress["loss_scale"])
        return loaded

    def _tensors(self, *, optimizer: bool) -> dict[str, Stored]:
        """What a checkpoint holds, by logical name."""
        named = self._parameters.items()
        tensors: dict[str, torch.Tensor] = {f"model.{name}": parameter for name, parameter in named}
        if optimizer:
            tensors |= checkpoint.optimizer_tensors(self.optimizer, named)
        stored = {key: self._stored(key, tensor) for key, tensor in tensors.items()}
        return stored if self._eight_bit is None or not optimizer else stored | self._eight_bit.tensors()

    def _stored(self, key: str, tensor: torch.Tensor) -> Stored:
        """A tensor with what a checkpoint must know of it: which part of the logical one it is, if it does not say."""
        if self._groups.mesh is not None or self._groups.tp.size == 1 or tensor.dim() == 0:
            return tensor
        name = key.removeprefix("model.") if key.startswith("model.") else key.split(".", 2)[2]
        return checkpoint.Parts.of_tensor(tensor, Place(*place_of(name, tensor.shape, self._groups)))

    def _accumulate_gradients(self, microbatches: Sequence[Batch]) -> tuple[float, RouterReport | None]:
        """Gradients of the mean loss over the global batch, times the loss scale; returns that mean loss.

        To it come the losses of routers, if there are any: their figures are returned, too.
        """
        tokens = count_tokens(microbatches, self._groups, self._device)
        scale, router, count = self.loss_scale.value, self._router, len(microbatches)
        auxiliary = None if router is None else router.begin(scale / (count * self._groups.dp.size))
        loss_sum = self._pipeline.train(microbatches, scale / tokens, auxiliary)
        if self._tied is not None:
            self._tied.collect_gradient()
        self._sum_gradients()
        report = None if router is None or auxiliary is None else router.report(auxiliary, count)
        return (self._groups.sum_over_data(loss_sum) / tokens).item(), report

    def _sum_gradients(self) -> None:
        """Sum the gradients over the data-parallel ranks, where FSDP2 has not done so in backward."""
        if self._groups.mesh is None and self._groups.dp_cp.size > 1:
            gradients.sum_over_data(self._parameters, self._groups, self._settings.reduce_dtype)
            self._cut_graph()  # or a lazy device would sum them again for every number that the host reads

    def _reshard(self) -> None:
        """Back to the sharded parameters, known to optimizer and checkpoints: a forward alone leaves them gathered."""
        for module in (module for stage in self._stages.values() for module in stage.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()

    def _synchronize_gradients(self, stage: GPT, last: bool) -> None:
        """Tell FSDP2 whether this backward ends with a reduction over the data-parallel ranks."""
        if not isinstance(stage, FSDPModule):
            return
        stage.set_requires_gradient_sync(last or self._settings.stage >= 2)
        stage.set_is_last_backward(last)
        stage.set_reshard_after_backward(last or self._settings.stage == 3)

    def _by_copies(self, tensors: Mapping[str, torch.Tensor]) -> gradients.ByCopies:
        return gradients.group_by_copies(tensors, self._copies)

    def _clip(self, copies: gradients.ByCopies, scale: float) -> float:
        """Divide the gradients by the loss scale and clip them; returns their norm before that, over all ranks."""
        norm = self._clip_grad_norm(
            copies,
            self._device,
            limit=self._settings.clip_grad,
            scale=scale,
            sum_over_ranks=self._groups.sum_over_ranks if self._groups.world.size > 1 else None,
        )
        return norm.item()

    def _count_zeros(self, copies: gradients.ByCopies) -> int | None:
        if not self._settings.count_zeros:
            return None
        return round(self._groups.sum_over_ranks(gradients.zero_count(copies, self._device)).item())

    def _step_optimizer(self, settings: StepSettings) -> None:
        set_schedules(self.optimizer, settings)
        self.optimizer.step()
        self._refresh()

    def _refresh(self) -> None:
        """Bring what is made from the parameters up to date with them."""
        if self._tied is not None:
            self._tied.refresh()
        if self._half is not None:
            self._half.refresh()
