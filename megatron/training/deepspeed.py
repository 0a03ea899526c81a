"""The DeepSpeed engine: `deepspeed.initialize` around the same model, whose parameters are plain local tensors.

DeepSpeed is imported here and in `deepspeed_pipeline`, when an engine is built.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron import checkpoint
from megatron.accelerators.base import Accelerator
from megatron.checkpoint import Loaded
from megatron.data.batch import Batch
from megatron.model.inputs import Auxiliary
from megatron.model.weights import holders, place_of
from megatron.mpu.eight_bit import EightBitScaling
from megatron.mpu.groups import ProcessGroups
from megatron.mpu.sharding import is_replicated_kv, shard_dim
from megatron.training import gradients
from megatron.training.deepspeed_scale import read_scale, write_scale
from megatron.training.deepspeed_state import DeepSpeedState
from megatron.training.engine import LoadSource, SaveTarget, StepResult, StepSettings
from megatron.training.loss import TokenLoss
from megatron.training.optimizer import set_schedules
from megatron.training.router_losses import RouterLosses, RouterReport
from megatron.training.setup import SetupError
from megatron.training.step import MicroStep, count_tokens, evaluate_microbatches

_MINUTES_TO_COMPILE = 15
"""More than an extension of DeepSpeed's takes on a slow machine; alone on two cores it is about one."""


class ModelParallelUnit:
    """The process groups under the names that DeepSpeed asks its `mpu` argument for."""

    def __init__(self, groups: ProcessGroups) -> None:
        if groups.mesh is None:
            raise RuntimeError("the DeepSpeed engine needs torch.distributed to be initialised")
        self._groups = groups
        self._mesh = groups.mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part of the model; to DeepSpeed, context-parallel ranks are among them."""
        return self._groups.dp_cp.handle or self._mesh.get_group("dp_shard")

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of that group."""
        return list(self._groups.dp_cp.ranks)

    def get_data_parallel_rank(self) -> int:
        """Rank in that group."""
        return self._groups.dp_cp.rank

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return self._groups.dp_cp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share one copy of the model."""
        return self._mesh.get_group("tp")

    def get_model_parallel_rank(self) -> int:
        """Rank in that group."""
        return self._groups.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return self._groups.tp.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def import_deepspeed() -> Any:
    """DeepSpeed, without its habit of compiling a C++ extension when communication starts on a CPU."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_offload(config: Mapping[str, Any]) -> None:
    """Find out before anything is built whether DeepSpeed can use a drive that its settings name.

    Raises:
        SetupError: it cannot.
    """
    zero = config.get("zero_optimization", {})
    asked = [part for part in ("offload_optimizer", "offload_param") if zero.get(part, {}).get("device") == "nvme"]
    if not asked:
        return
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise SetupError(
            f'zero_optimization.{asked[0]}.device = "nvme": DeepSpeed cannot build its asynchronous input and output '
            'here, because libaio (package libaio-dev) is missing; install it, or take "cpu"'
        )


def check_compiler(extension: str) -> None:
    """Find out whether a process that compiled an extension of torch's left its lock, for which all others wait.

    Raises:
        SetupError: the lock is older than a compilation takes.
    """
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory(extension, verbose=False)) / "lock"
    try:
        minutes = (time.time() - lock.stat().st_mtime) / 60
    except FileNotFoundError:
        return
    if minutes > _MINUTES_TO_COMPILE:
        raise SetupError(
            f"{lock} is {minutes:.0f} minutes old: a process that compiled {extension} for DeepSpeed was killed, and "
            "every other one waits for it. If none is compiling now, remove that file"
        )


def host_adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for optimizer state on the host; compiled with the machine's C++ compiler when first used.

    Raises:
        SetupError: a process was killed while it compiled it.
    """
    import_deepspeed()
    check_compiler("cpu_adam")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)


def mark_split_parameters(model: nn.Module, groups: ProcessGroups) -> None:
    """Note down which parameters are split over the tensor-parallel ranks, and how many hold the same (`holders`).

    They are named logically. DeepSpeed's norm counts split parameters on every tensor-parallel rank and the others on
    the first one, so of the copies of a key-value head the first is called split.
    """
    copies = groups.kv_copies
    for name, parameter in model.named_parameters():
        split = groups.tp.size > 1 and shard_dim(name) is not None
        if copies is not None and is_replicated_kv(name, copies.size):
            split = copies.rank == 0
        parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
        parameter.holders = holders(name, groups)  # type: ignore[attr-defined]


class DeepSpeedEngine:
    """Trains a model through DeepSpeed; see `Engine` for the methods.

    Args:
        model: what DeepSpeed calls.
        parameters: those of the model, by logical name.
        token_loss: of the model's output.
        optimizer: of the parameters.
        config: DeepSpeed's settings.
        mpu: the process groups; None for a pipeline, which has its own.
        groups: this process's groups.
        accelerator, device: where the model is.
        vocab_size: rows of the embedding that are no padding.
        eight_bit: the scales of the model's 8-bit layers; None = it has none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Mapping[str, nn.Parameter],
        token_loss: TokenLoss,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        mpu: ModelParallelUnit | None,
        groups: ProcessGroups,
        accelerator: Accelerator,
        device: torch.device,
        router: RouterLosses | None = None,
        vocab_size: int,
        eight_bit: EightBitScaling | None,
    ) -> None:
        deepspeed = import_deepspeed()
        if torch.float64 not in accelerator.capabilities.dtypes:
            # DeepSpeed would compute and reduce gradient norms in float64, which Ascend's collectives refuse.
            deepspeed.accelerator.get_accelerator().is_fp64_supported = lambda: False
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            # Of ranks that share a sample, DeepSpeed thinks that each has its own.
            config={**config, "train_batch_size": config["train_batch_size"] * groups.cp.size},
            mpu=mpu,
            dist_init_required=False,
        )
        self._state = DeepSpeedState(
            self.optimizer, parameters, lambda name, shape: checkpoint.Place(*place_of(name, shape, groups))
        )
        self._micro_step = MicroStep(self.engine, token_loss)
        self._groups = groups
        self._accelerator = accelerator
        self._device, self._router = device, router
        self._vocab_size = vocab_size
        self._eight_bit = eight_bit

    def train_step(self, microbatches: Sequence[Batch], settings: StepSettings) -> StepResult:
        """Forward and backward of the micro-batches, then one step of DeepSpeed's optimizer; see `Engine`."""
        self.engine.train()
        set_schedules(self.optimizer, settings)
        self._set_microbatches(len(microbatches))
        scale = self._loss_scale()
        tokens = count_tokens(microbatches, self._groups, self._device)
        loss_sum = torch.zeros((), dtype=torch.float32, device=self._device)
        auxiliary = self._begin_routing(scale, 1 / len(microbatches))
        norm: float | None = None
        dropped = False
        for batch in microbatches:
            loss = self._micro_step(batch.to(self._device), auxiliary)
            # DeepSpeed averages over the ranks with the same weights; the sum is wanted.
            self.engine.backward(loss * (self._groups.dp_cp.size / tokens), scale_wrt_gas=False)
            loss_sum += loss.detach()
            if self.engine.is_gradient_accumulation_boundary():
                norm = self._plain_norm()
                dropped = norm is not None and not math.isfinite(norm)
            if dropped:  # stage 0 in float32 is the one place where DeepSpeed would apply them
                self.engine.zero_grad()
                self.engine.micro_steps += 1
            else:
                self.engine.step()
            self._accelerator.end_of_micro_step()
        if self._eight_bit is not None:
            self._eight_bit.after_step()
        norm = norm if norm is not None else float(self.engine.get_global_grad_norm())
        return StepResult(
            loss=(self._groups.sum_over_data(loss_sum) / tokens).item(),
            grad_norm=norm,
            skipped=dropped or not self.engine.was_step_applied(),
            loss_scale=scale,
            router=self._routed(auxiliary, len(microbatches)),
        )

    def _begin_routing(self, scale: float, share: float) -> Auxiliary | None:
        """What becomes of the losses of routers in a step; None without experts.

        Args:
            scale: of the losses; DeepSpeed multiplies those that it is given by it.
            share: of a micro-batch in what DeepSpeed, which averages over ranks, makes of the gradients.
        """
        return None if self._router is None else self._router.begin(scale * share * self._groups.cp.size)

    def _routed(self, auxiliary: Auxiliary | None, microbatches: int) -> RouterReport | None:
        if self._router is None or auxiliary is None:
            return None
        return self._router.report(auxiliary, microbatches)

    def eval_step(self, microbatches: Sequence[Batch]) -> tuple[float, float]:
        """Loss sum and token count over all ranks; see `Engine`."""
        self.engine.eval()
        return evaluate_microbatches(self._micro_step, microbatches, self._groups, self._device)

    def parameters_norm(self) -> float:
        """L2 norm of all parameters; see `Engine`. Under stage 3 parameters are gathered one after the other."""
        from deepspeed.utils import safe_get_full_fp32_param

        copies: dict[int, list[torch.Tensor]] = defaultdict(list)
        for parameter in self.engine.module.parameters():
            if getattr(parameter, "ds_pipe_replicated", False):
                continue
            gathered = self.engine.zero_optimization_partition_weights()
            value = safe_get_full_fp32_param(parameter) if gathered else parameter.detach()
            copies[parameter.holders].append(value)
        return self._norm(copies)

    def save(self, target: SaveTarget, iteration: int, progress: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Write a checkpoint that any layout and engine can read; see `Engine`."""
        tensors = self._state.tensors(optimizer=target.optimizer, saving=True)
        if target.heal and target.saver.heal(tensors):
            self._state.restored(tensors)
        state = checkpoint.TrainingState(
            tensors=tensors | (self._scaling() if target.optimizer else {}),
            progress={**progress, "loss_scale": read_scale(self.optimizer).state()},
            run=run,
            vocab_size=self._vocab_size,
        )
        target.saver.save(iteration, state)

    def load(self, source: LoadSource, *, optimizer: bool, log: Callable[[str], None]) -> Loaded | None:
        """Restore weights and optimizer state from a checkpoint of any layout and engine; see `Engine`."""
        tensors = self._state.tensors(optimizer=optimizer, saving=False)
        if self._eight_bit is not None:
            self._eight_bit.forget()
        loaded = checkpoint.load(
            source.root,
            into=tensors | (self._scaling() if optimizer else {}),
            iteration=source.iteration,
            sections=None if optimizer else {"model"},
            vocab_size=self._vocab_size,
            verify=source.verify,
            fallback=source.fallback,
            log=log,
            progress=source.progress,
        )
        if loaded is None:
            return None
        self._state.restored(tensors)
        if self._eight_bit is not None:
            self._eight_bit.refresh()
        if optimizer:
            write_scale(self.optimizer, read_scale(self.optimizer).resumed(loaded.progress["loss_scale"]))
        return loaded

    def _scaling(self) -> dict[str, torch.Tensor]:
        return {} if self._eight_bit is None else self._eight_bit.tensors()

    def _set_microbatches(self, number: int) -> None:
        """Batch ramp-up: DeepSpeed counts micro-batches itself, so it has to be told."""
        if number == self.engine.gradient_accumulation_steps():
            return
        micro_batch_size = self.engine.train_micro_batch_size_per_gpu()
        self.engine.set_train_batch_size(micro_batch_size * number * self._groups.dp_cp.size)

    def _loss_scale(self) -> float:
        return float(getattr(self.optimizer, "cur_scale", getattr(self.optimizer, "loss_scale", 1.0)))

    def _plain_norm(self) -> float | None:
        """Norm of the gradients where DeepSpeed leaves them as they are (stage 0 in float32) and keeps no norm."""
        if self.engine.zero_optimization() or self.engine.fp16_enabled() or self.engine.bfloat16_enabled():
            return None
        copies: dict[int, list[torch.Tensor]] = defaultdict(list)
        for parameter in self.engine.module.parameters():
            if parameter.grad is not None:
                copies[parameter.holders].append(parameter.grad)
        return self._norm(copies)

    def _norm(self, copies: gradients.ByCopies) -> float:
        return math.sqrt(self._groups.sum_over_ranks(gradients.square_sum(copies, self._device)).item())
