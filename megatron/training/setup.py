"""What a run stands on: device, ranks, kernels and log, chosen once from the settings."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.accelerators import Accelerator, deepspeed_environment, select
from megatron.config.run import RunConfig
from megatron.mpu.expert_parallel import with_experts
from megatron.mpu.groups import ProcessGroups, build_groups, check_sums_suffice
from megatron.mpu.topology import Topology
from megatron.ops import Ops, UnavailableOpError, build_table, implementations
from megatron.training.report import Printers


class SetupError(ValueError):
    """Settings that this machine or this launch cannot satisfy."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that is decided before the model exists; the same decisions on every rank."""

    accelerator: Accelerator
    device: torch.device
    groups: ProcessGroups
    ops: Ops
    op_lines: tuple[str, ...]
    """One line per operation: which implementation was chosen and why."""
    printers: Printers


def start(config: RunConfig, env: Mapping[str, str] = os.environ) -> Session:
    """Choose the device and the kernels, join the other ranks and make the process groups.

    Raises:
        ValueError: the device, an implementation or the collective backend that was asked for is not to be had.
    """
    _quiet_dependencies()
    accelerator = select(config.device.device)
    topology = run_topology(config, accelerator)
    backend = _backend(config, accelerator)
    asked = asked_implementations(config, accelerator)
    ops, op_lines = build_table(accelerator, asked)
    op_lines += engine_lines(config, accelerator)
    if config.deepspeed.deepspeed:
        os.environ.update(deepspeed_environment(accelerator, env))
    device = accelerator.set_device(config.parallel.local_rank)
    join(backend, env, timedelta(minutes=config.parallel.distributed_timeout_minutes))
    groups = _groups(config, accelerator, topology)
    printers = Printers.of(dist.get_rank(), dist.get_world_size())
    for line in (f"device: {accelerator.name}, {accelerator.device_description()}; collectives: {backend}", *op_lines):
        printers.rank0(line)
    return Session(
        accelerator=accelerator, device=device, groups=groups, ops=ops, op_lines=tuple(op_lines), printers=printers
    )


def run_topology(config: RunConfig, accelerator: Accelerator) -> Topology:
    """The grid of ranks.

    Raises:
        ValueError: the device cannot have such a grid.
    """
    parallel = config.parallel
    topology = Topology(
        parallel.world_size,
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.ring_parallel_size * parallel.ulysses_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        ep=config.moe.moe_expert_parallel_size,
        ulysses=parallel.ulysses_parallel_size,
    )
    if accelerator.capabilities.communicator is not None:
        check_sums_suffice(topology, parallel.zero_stage_native)
    return topology


def _groups(config: RunConfig, accelerator: Accelerator, topology: Topology) -> ProcessGroups:
    groups = build_groups(
        topology,
        accelerator.torch_device_type,
        dp_replicas=_replicas(config, topology),
        kv_copies=config.parallel.kv_replicator,
        communicator=accelerator.capabilities.communicator,
    )
    return with_experts(groups, accelerator.torch_device_type, copies=_expert_copies(config))


def _expert_copies(config: RunConfig) -> int | None:
    """Copies of the training state of experts; None = as many as there are ranks with the same experts."""
    parallel = config.parallel
    replicated = config.deepspeed.deepspeed or parallel.zero_stage_native == 0
    return None if replicated else parallel.num_distributed_optimizer_instances


def _backend(config: RunConfig, accelerator: Accelerator) -> str:
    """The collective backend: that of the device, which an explicit flag must agree with."""
    asked = config.parallel.distributed_backend
    if "distributed_backend" in config.given and asked != accelerator.collective_backend:
        raise SetupError(
            f"--distributed-backend is {asked}, but device {accelerator.name} communicates with "
            f"{accelerator.collective_backend}; leave the flag out"
        )
    return accelerator.collective_backend


def _quiet_dependencies() -> None:
    """Torch 2.13 renames two collectives; FSDP2 and DeepSpeed still call the old names, once per rank and call site."""
    names = "all_gather_into_tensor|reduce_scatter_tensor"
    warnings.filterwarnings("ignore", message=f".*torch.distributed.({names}).* is deprecated", category=FutureWarning)


def join(backend: str, env: Mapping[str, str], timeout: timedelta) -> None:
    """Initialise torch.distributed, if that is not done; a process without a launcher is a world of one."""
    if dist.is_initialized():
        return
    if "RANK" in env:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps the store when it starts the ranks again, with the addresses of those that are dead.
        attempt = dist.PrefixStore(f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, timeout=timeout, store=attempt, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def _replicas(config: RunConfig, topology: Topology) -> int:
    """Copies of the training state: all ranks with the same weights at stage 0, else what hybrid sharding asks for."""
    if config.deepspeed.deepspeed:
        return 1
    if config.parallel.zero_stage_native == 0:
        return topology.dp * topology.cp
    return config.parallel.num_distributed_optimizer_instances


def _attention(accelerator: Accelerator, op: str, kind: str) -> str:
    """What `--attention-backend` means on this device: flash-attn where it has that, else the best it has."""
    if kind in ("unfused", "local"):
        return "reference"
    known = [candidate.name for candidate in implementations(accelerator, op)]
    return "flash_attn" if kind == "flash" and "flash_attn" in known else known[0]


def _no_all_reduce(config: RunConfig) -> str:
    """Why no linear layer of this run ends in an all-reduce in the format of its numbers; empty where they do."""
    if config.parallel.tensor_model_parallel_size == 1:
        return "there is nothing to sum at --tensor-model-parallel-size 1"
    if config.parallel.sequence_parallel:
        return "with --sequence-parallel such layers end in a reduce-scatter"
    if config.precision.fp8_format is not None:
        return f"with --fp8-format {config.precision.fp8_format} such layers compute with 8-bit numbers"
    return ""


def _engine(accelerator: Accelerator) -> tuple[str, str]:
    """The 8-bit products that `--transformer-impl transformer_engine` means on a device, and why no engine makes them.

    The device's first implementation takes the place of an engine that cannot be used, if it is not that engine itself.
    """
    candidates = implementations(accelerator, "make_linear")
    engine = next((candidate for candidate in candidates if candidate.name == "transformer_engine"), None)
    reason = "" if engine is None else engine.why_unavailable()
    return (candidates[0] if engine is None or reason else engine).name, reason


def engine_lines(config: RunConfig, accelerator: Accelerator) -> list[str]:
    """What `--transformer-impl transformer_engine` comes to, for the log; nothing without it."""
    if config.device.transformer_impl != "transformer_engine":
        return []
    name, reason = _engine(accelerator)
    instead = f" (transformer_engine unavailable: {reason})" if reason else ""
    return [
        f"--transformer-impl transformer_engine: 8-bit products by {name}{instead}; layers and scales are this "
        "program's own"
    ]


_COMPILED = ("rms_norm", "layer_norm", "rotary", "swiglu", "geglu", "bias_gelu")
"""Operations of a layer that a compiler fuses best from their plain definitions (`--use-torch-compile`)."""


def asked_implementations(config: RunConfig, accelerator: Accelerator) -> dict[str, str]:
    """Operation -> implementation, from `--op` and from Megatron's flags that stand for one.

    Raises:
        UnavailableOpError: an `--op` that is not `name=implementation` or whose operation this run does not have, or
            two flags that contradict each other.
    """
    settings = config.device
    asked: dict[str, str] = {}
    ring = config.parallel.ring_parallel_size > 1
    attention = ("attention_block", "attention_block_backward") if ring else ("attention",)

    def ask(op: str, name: str, flag: str) -> None:
        if asked.setdefault(op, name) != name:
            raise UnavailableOpError(f"{flag} asks for {op}={name}, another flag for {op}={asked[op]}; give one")

    for item in settings.op:
        op, _, name = item.partition("=")
        if not name:
            raise UnavailableOpError(f"--op {item}: must be operation=implementation, such as attention=reference")
        if op == "matmul_all_reduce" and (why_none := _no_all_reduce(config)):
            raise UnavailableOpError(f"--op {item}: {why_none}; leave it out")
        ask(op, name, f"--op {item}")
    kind = settings.attention_backend
    for op in attention:
        if kind != "auto":
            ask(op, _attention(accelerator, op, kind), f"--attention-backend {kind}")
        if not settings.masked_softmax_fusion:
            ask(op, "reference", "--no-masked-softmax-fusion")
    if not settings.bias_gelu_fusion:
        ask("bias_gelu", "reference", "--no-bias-gelu-fusion")
    if not settings.bias_dropout_fusion:
        ask("bias_dropout_add", "reference", "--no-bias-dropout-fusion")
    if settings.use_fused_rmsnorm is not None:
        name = implementations(accelerator, "rms_norm")[0].name if settings.use_fused_rmsnorm else "reference"
        ask("rms_norm", name, "--use-fused-rmsnorm")
    if settings.use_torch_compile:
        if accelerator.capabilities.compile_backend is None:
            raise SetupError(f"--use-torch-compile: {accelerator.device_description()} cannot compile; leave it out")
        for op in _COMPILED:
            asked.setdefault(op, "reference")
    if config.precision.fp8_format is not None and not accelerator.capabilities.float8:
        raise SetupError(
            f"--fp8-format {config.precision.fp8_format}: {accelerator.name} does not compute with 8-bit numbers here; "
            "leave it out"
        )
    if settings.transformer_impl == "transformer_engine":
        name, _ = _engine(accelerator)
        if name == "reference":
            raise SetupError(f"--transformer-impl transformer_engine: {accelerator.name} has none; leave it out")
        ask("make_linear", name, "--transformer-impl transformer_engine")
    if config.optimizer.optimizer == "fusedadamw":
        ask("adamw", implementations(accelerator, "adamw")[0].name, "--optimizer fusedadamw")
    return asked
