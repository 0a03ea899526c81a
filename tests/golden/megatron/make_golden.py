"""Makes the files of this folder with megatron-core 0.16.1, on two CPU processes with expert parallelism 2.

    python tests/golden/megatron/make_golden.py

Needs an environment with megatron-core 0.16.1, torch, numpy and psutil, in which `megatron.core` is that package's. The
package expects a GPU; what would ask one is redirected.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
EXPERTS, RANKS, ROWS = 4, 2, 16
SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 12}
KINDS = {"distributed": True, "plain": False}
PORT = "29634"


class OnCpu(torch.overrides.TorchFunctionMode):
    """Whatever is asked of a GPU is done on the CPU; bfloat16 tensors pass for ones of a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


class Stream:
    """Stands for one of CUDA."""

    def __init__(self, *_: Any) -> None: ...


def without_gpu() -> None:
    """Replace what Megatron-Core asks of CUDA."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.Stream = torch.cuda.current_stream = torch.cuda.Event = Stream
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    OnCpu().__enter__()


def model() -> Any:
    """A tiny Mixtral; no two tensors are alike, but what is no expert is the same on both ranks."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    fusions = ("bias_activation", "masked_softmax", "bias_dropout", "gradient_accumulation")
    config = TransformerConfig(
        **SIZES,
        **{f"{name}_fusion": False for name in fusions},
        apply_rope_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        bf16=True,
        params_dtype=torch.bfloat16,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=SIZES["ffn_hidden_size"],
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=RANKS,
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=EXPERTS, moe_grouped_gemm=False),
        vocab_size=ROWS,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).bfloat16()
    rank = parallel_state.get_expert_model_parallel_rank()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(gpt.named_parameters()):
            seed = number + 100 * (rank + 1) * ("local_experts" in name)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return gpt


def trained(gpt: Any, *, distributed: bool) -> Any:
    """Its optimizer after two steps with gradients of its own."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(gpt.config, settings, gpt, disable_bucketing=True)
    adam = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
        weight_decay=0.1,
        clip_grad=0.0,
    )
    optimizer = get_megatron_optimizer(adam, [wrapped])
    for step in range(2):
        for number, parameter in enumerate(gpt.parameters()):
            generator = torch.Generator().manual_seed(7 * number + step)
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return optimizer


def state_in_memory(optimizer: Any, gpt: Any, *, distributed: bool) -> dict[str, dict[str, tuple[int, Tensor]]]:
    """Entry -> name of the parameter with its expert's number among all -> where this rank's part begins, the part."""
    from megatron.core import parallel_state

    first = parallel_state.get_expert_model_parallel_rank() * EXPERTS // RANKS
    truth: dict[str, dict[str, tuple[int, Tensor]]] = {entry: {} for entry in ("fp32", "exp_avg", "exp_avg_sq")}
    for one in optimizer.chained_optimizers:
        for name, parameter in gpt.named_parameters():
            full = re.sub(r"(?<=local_experts\.)\d+", lambda number: str(int(number[0]) + first), name)
            if distributed and parameter in one.model_param_gbuf_map:
                start = one._get_model_param_range_map(parameter)["param"].start
                parts = one._get_main_param_and_optimizer_states(parameter)
            elif not distributed and parameter.main_param in one.optimizer.state:
                start, parts = 0, {"param": parameter.main_param, **one.optimizer.state[parameter.main_param]}
            else:
                continue
            for entry, tensors in truth.items():
                tensors[full] = start, parts["param" if entry == "fp32" else entry].detach().flatten().clone()
    return truth


def work(rank: int, kind: str) -> None:
    """One process."""
    from megatron.core import parallel_state

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    without_gpu()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    gpt = model()
    optimizer = trained(gpt, distributed=KINDS[kind])
    folder = HERE / kind / "iter_0000002" / f"mp_rank_00_{parallel_state.get_expert_model_parallel_rank():03d}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "args": argparse.Namespace(tensor_model_parallel_size=1, expert_model_parallel_size=RANKS),
        "checkpoint_version": 3.0,
        "iteration": 2,
        "model": gpt.state_dict_for_save_checkpoint(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, folder / "model_optim_rng.pt")
    if KINDS[kind]:
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
    (HERE / kind / "latest_checkpointed_iteration.txt").write_text("2")
    torch.save(state_in_memory(optimizer, gpt, distributed=KINDS[kind]), HERE / kind / f"truth_{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    for kind in KINDS:
        processes = [multiprocessing.Process(target=work, args=(rank, kind)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
