"""From settings to an engine: the model of this rank, its initial weights, its optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

from megatron.config.architecture import Architecture
from megatron.config.deepspeed import merge
from megatron.config.run import RunConfig
from megatron.model.gpt import GPT, RecomputePlan
from megatron.model.weights import initialise_parameters, to_dtensors
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.ops import Ops
from megatron.training.deepspeed import DeepSpeedEngine, host_adamw
from megatron.training.engine import Engine
from megatron.training.loss import TokenLoss
from megatron.training.loss_scale import LossScale
from megatron.training.native import NativeEngine, NativeSettings, shard_data_parallel
from megatron.training.optimizer import parameter_groups
from megatron.training.setup import Session


def build_engine(config: RunConfig, session: Session, arch: Architecture) -> Engine:
    """The engine that `config` asks for, with initial weights."""
    if config.deepspeed.deepspeed:
        return _build_deepspeed(config, session, arch)
    return _build_native(config, session, arch)


def _build_native(config: RunConfig, session: Session, arch: Architecture) -> NativeEngine:
    settings = native_settings(config)
    model = _model(config, session, arch, torch.device("meta"))
    assert session.groups.mesh is not None
    to_dtensors(model, session.groups.mesh)
    shard_data_parallel(model, model.layers.values(), session.groups, settings)
    model.to_empty(device=session.device)
    initialise_parameters(model, arch, session.groups, config.training.seed)
    return NativeEngine(
        model,
        token_loss=_token_loss(arch, session),
        vocab_size=arch.vocab_size,
        optimizer=_optimizer(config, session.ops, model.named_parameters()),
        groups=session.groups,
        accelerator=session.accelerator,
        device=session.device,
        settings=settings,
    )


def _build_deepspeed(config: RunConfig, session: Session, arch: Architecture) -> DeepSpeedEngine:
    model = _model(config, session, arch, session.device)
    initialise_parameters(model, arch, session.groups, config.training.seed)
    return DeepSpeedEngine(
        model,
        token_loss=_token_loss(arch, session),
        optimizer=_optimizer(config, session.ops, model.named_parameters()),
        config=merge(config.deepspeed_document, config),
        groups=session.groups,
        accelerator=session.accelerator,
        device=session.device,
    )


def _model(config: RunConfig, session: Session, arch: Architecture, device: torch.device) -> GPT:
    training = config.training
    model = GPT(
        arch,
        ops=session.ops,
        groups=session.groups,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=RecomputePlan(
            granularity=training.recompute_granularity or "none",
            method=training.recompute_method or "uniform",
            num_layers=training.recompute_num_layers,
        ),
        device=device,
    )
    if config.device.use_torch_compile:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward)  # the forward alone: hooks of the engines stay outside
    return model


def _token_loss(arch: Architecture, session: Session) -> TokenLoss:
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
