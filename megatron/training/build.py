"""From settings to an engine: the model of this rank, its initial weights, its optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megatron.config.architecture import Architecture
from megatron.config.deepspeed import merge
from megatron.config.run import RunConfig
from megatron.model.eight_bit import use_eight_bit
from megatron.model.gpt import GPT
from megatron.model.recompute import recompute_plan
from megatron.model.weights import experts_to_dtensors, initialise_parameters, to_dtensors
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.deferred import DeferredGradients
from megatron.mpu.eight_bit import EightBitScaling, ScalingRecipe
from megatron.mpu.groups import ProcessGroups
from megatron.mpu.pipeline import Placement, StageLayout
from megatron.mpu.schedule import splits_backward
from megatron.ops import Ops, float8
from megatron.training.deepspeed import (
    DeepSpeedEngine,
    ModelParallelUnit,
    check_offload,
    host_adamw,
    mark_split_parameters,
)
from megatron.training.deepspeed_experts import announce_experts
from megatron.training.deepspeed_pipeline import DeepSpeedPipelineEngine
from megatron.training.engine import Engine
from megatron.training.half import HalfWeights
from megatron.training.loss import TokenLoss, losses_of_model
from megatron.training.loss_scale import LossScale
from megatron.training.native import NativeEngine, NativeSettings, shard_data_parallel
from megatron.training.optimizer import parameter_groups
from megatron.training.pipeline import PipelineSettings
from megatron.training.pretrained import load_pretrained, open_pretrained, pretrained_kind
from megatron.training.probes import Probe
from megatron.training.router_losses import router_losses
from megatron.training.routing import routing_plan
from megatron.training.setup import Session
from megatron.training.tied import logical_parameters, tied_embedding


def build_engine(config: RunConfig, session: Session, arch: Architecture, probes: Sequence[Probe] = ()) -> Engine:
    """The engine that `config` asks for, with initial weights; `probes` look into its model."""
    if config.deepspeed.deepspeed:
        return _build_deepspeed(config, session, arch, probes)
    return _build_native(config, session, arch, probes)


def _build_native(config: RunConfig, session: Session, arch: Architecture, probes: Sequence[Probe]) -> NativeEngine:
    settings, layout, groups = native_settings(config), stage_layout(config), session.groups
    plan = routing_plan(config.values(), arch)
    stages: dict[int, GPT] = {}
    scaling = eight_bit_scaling(config, session)
    for number in layout.stages_of(groups.pp.rank):
        model = _model(config, session, arch, torch.device("meta"), layout, number)
        if groups.experts is not None and groups.experts.mesh is not None:
            experts_to_dtensors(model, groups.experts.mesh)
        _equip(model, session, scaling, probes)
        if groups.mesh is not None:
            to_dtensors(model, groups.mesh, groups.kv_mesh)
        sharded = shard_data_parallel(model, model.layers.values(), groups, settings)
        model.to_empty(device=session.device)
        _initial_weights(model, config, arch, groups)
        stages[number] = model
    half = HalfWeights(model, settings.dtype) if not sharded and settings.dtype != torch.float32 else None
    parameters = logical_parameters(stages, layout) if half is None else half.masters
    return NativeEngine(
        stages,
        parameters=parameters,
        pipeline=pipeline_settings(config, arch, layout),
        tied=tied_embedding(stages, layout, groups.pp) if arch.tied_embeddings else None,
        half=half,
        eight_bit=scaling,
        clip_grad_norm=session.ops.clip_grad_norm,
        token_loss=_token_loss(arch, session),
        vocab_size=arch.vocab_size,
        optimizer=_optimizer(config, session.ops, parameters.items()),
        groups=groups,
        accelerator=session.accelerator,
        device=session.device,
        settings=settings,
        router=None if plan is None else router_losses(arch, plan, groups, session.device),
    )


def _build_deepspeed(
    config: RunConfig, session: Session, arch: Architecture, probes: Sequence[Probe]
) -> DeepSpeedEngine:
    layout, groups = stage_layout(config), session.groups
    settings = merge(config.deepspeed_document, config)
    check_offload(settings)
    model = _model(config, session, arch, session.device, layout, groups.pp.rank)
    scaling = eight_bit_scaling(config, session)
    _equip(model, session, scaling, probes)
    _initial_weights(model, config, arch, groups)
    plan = routing_plan(config.values(), arch)
    parts: dict[str, Any] = {
        "parameters": dict(model.named_parameters()),
        "vocab_size": arch.vocab_size,
        "eight_bit": scaling,
        "token_loss": _token_loss(arch, session),
        "optimizer": _optimizer(config, session.ops, model.named_parameters()),
        "config": settings,
        "groups": groups,
        "accelerator": session.accelerator,
        "device": session.device,
        "router": None if plan is None else router_losses(arch, plan, groups, session.device),
    }
    if groups.experts is not None and arch.experts is not None:
        announce_experts(model, parts["optimizer"], groups.experts, arch.experts.count)
    if layout.ranks > 1:
        return DeepSpeedPipelineEngine(model, tied=arch.tied_embeddings, **parts)
    mark_split_parameters(model, groups)
    return DeepSpeedEngine(model, mpu=ModelParallelUnit(groups), **parts)


def _initial_weights(model: nn.Module, config: RunConfig, arch: Architecture, groups: ProcessGroups) -> None:
    """Those that `--load` has in another format than this project's, or random ones."""
    settings = config.checkpoint
    kind = pretrained_kind(settings.load)
    if settings.load is None or kind is None:
        initialise_parameters(model, arch, groups, config.training.seed)
        return
    source = open_pretrained(settings.load, kind, settings.ckpt_step, finetune=settings.finetune)
    load_pretrained(model, source, arch, groups)


def _model(
    config: RunConfig, session: Session, arch: Architecture, device: torch.device, layout: StageLayout, stage: int
) -> GPT:
    plan = recompute_plan(vars(config.training), pinned=session.accelerator.capabilities.pinned_memory)
    model = GPT(
        arch,
        ops=session.ops,
        groups=session.groups,
        sequence_parallel=config.parallel.sequence_parallel,
        layers=layout.layers_of(stage),
        first=stage == 0,
        last=stage == layout.last,
        recompute=plan.of_stage(stage),
        deferred=_deferred(config, layout, stage),
        routing=routing_plan(config.values(), arch),
        device=device,
    )
    if config.device.use_torch_compile:
        for block in model.layers.values():
            # The forward alone: hooks of the engines stay outside.
            block.forward = torch.compile(block.forward, backend=session.accelerator.capabilities.compile_backend)
    return model


def _equip(model: GPT, session: Session, scaling: EightBitScaling | None, probes: Sequence[Probe]) -> None:
    """What a stage gets besides its layers, while its weights are plain tensors."""
    if scaling is not None:
        use_eight_bit(model, scaling, session.ops)
    for probe in probes:
        probe.attach(model)


def eight_bit_scaling(config: RunConfig, session: Session) -> EightBitScaling | None:
    """The scales of 8-bit layers; None where all layers compute in the format of the model."""
    precision = config.precision
    if precision.fp8_format is None:
        return None
    largest = session.accelerator.capabilities.float8
    recipe = ScalingRecipe(
        delayed=precision.fp8_recipe == "delayed",
        margin=precision.fp8_margin,
        interval=precision.fp8_interval,
        history=precision.fp8_amax_history_len,
        algorithm=precision.fp8_amax_compute_algo,
        reduce=precision.fp8_amax_reduce,
        keep_weights=precision.cache_fp8_weight,
    )
    formats = float8.formats(precision.fp8_format, largest, weight_gradient=precision.fp8_wgrad)
    return EightBitScaling(recipe, formats, session.groups, session.device)


def _deferred(config: RunConfig, layout: StageLayout, stage: int) -> DeferredGradients | None:
    """What collects the weight gradients of a stage, if the schedule computes them later and there are any."""
    has_weights = bool(layout.layers[stage]) or stage == layout.last
    return DeferredGradients() if has_weights and splits_backward(config.parallel.pipeline_schedule) else None


def _token_loss(arch: Architecture, session: Session) -> TokenLoss:
    if session.ops.linear_cross_entropy is not None:
        return losses_of_model
    return functools.partial(
        vocab_parallel_cross_entropy, vocab_size=arch.vocab_size, group=session.groups.tp, ops=session.ops
    )


def _optimizer(
    config: RunConfig, ops: Ops, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    settings = config.optimizer
    groups = parameter_groups(named_parameters)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.sgd_momentum)
    adamw = host_adamw if settings.cpu_optimizer and not settings.cpu_torch_adam else ops.adamw
    betas = (settings.adam_beta1, settings.adam_beta2)
    return adamw(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps, weight_decay=settings.weight_decay)


def stage_layout(config: RunConfig) -> StageLayout:
    """Which pipeline rank holds which layers."""
    parallel = config.parallel
    placement: Placement = "vee" if parallel.pipeline_schedule == "zbv" else "loop"
    return StageLayout(parallel.pipeline_model_parallel_size, parallel.pipeline_stage_layers, placement)


def pipeline_settings(config: RunConfig, arch: Architecture, layout: StageLayout) -> PipelineSettings:
    """How the micro-batches go through the stages."""
    parallel = config.parallel
    return PipelineSettings(
        layout=layout,
        schedule=parallel.pipeline_schedule,
        hidden_size=arch.hidden_size,
        hidden_dtype=torch.float32 if arch.fp32_residual else getattr(torch, config.precision.params_dtype),
        sequence_split=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
    )


def native_settings(config: RunConfig) -> NativeSettings:
    """What the flags ask of the native engine."""
    precision = config.precision
    dtype = getattr(torch, precision.params_dtype)
    return NativeSettings(
        stage=config.parallel.zero_stage_native,
        dtype=dtype,
        reduce_dtype=torch.bfloat16 if precision.grad_reduce_in_bf16 else torch.float32,
        clip_grad=config.optimizer.clip_grad,
        loss_scale=_loss_scale(config),
        count_zeros=config.logging.log_num_zeros_in_grad,
    )


def _loss_scale(config: RunConfig) -> LossScale:
    precision = config.precision
    if not precision.fp16:
        return LossScale.static(1.0)
    if precision.loss_scale is not None:
        return LossScale.static(precision.loss_scale)
    return LossScale.dynamic(
        precision.initial_loss_scale, precision.min_loss_scale, int(precision.loss_scale_window), precision.hysteresis
    )
