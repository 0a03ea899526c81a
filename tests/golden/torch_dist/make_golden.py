"""Makes the files of this folder with megatron-core 0.16.1, on two CPU processes with tensor parallelism 2.

    python tests/golden/torch_dist/make_golden.py

Needs an environment with megatron-core 0.16.1, torch, numpy and psutil, in which `megatron.core` is that package's. The
package expects a GPU; the few calls that would ask one are replaced.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
TP = 2
SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 24}
ROWS, TOKENS = 32, 27


def without_gpu() -> None:
    """Replace what Megatron-Core asks of CUDA."""
    import megatron.core.fusions.fused_softmax as softmax
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    softmax.get_default_causal_mask = lambda size: torch.triu(torch.ones(size, size), diagonal=1).bool()
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()


def model() -> Any:
    """A tiny LLaMA."""
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=TP,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=ROWS,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        parallel_output=False,
    )


def work(rank: int) -> None:
    """One process."""
    from megatron.core import dist_checkpointing, parallel_state

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29633")
    dist.init_process_group("gloo", rank=rank, world_size=TP)
    without_gpu()
    parallel_state.initialize_model_parallel(TP, 1)
    gpt = model()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(gpt.named_parameters()):
            same = parameter.dim() == 1  # norms are the same on all ranks
            generator = torch.Generator().manual_seed(number if same else 100 * (rank + 1) + number)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if same else 0.2 * noise)
    os.chdir(HERE)  # the index holds the path that it is written to
    Path("iter_0000005").mkdir(exist_ok=True)
    state = {"model": gpt.sharded_state_dict(), "checkpoint_version": 3.0, "iteration": 5}
    dist_checkpointing.save(state, "iter_0000005", ("torch_dist", 1))
    tokens = [token % TOKENS for token in range(16)]
    with torch.no_grad():
        logits = gpt(torch.tensor([tokens]), torch.arange(16)[None], None)[0, :, :TOKENS]
    if rank == 0:
        rows = [[float(f"{value:.9g}") for value in row] for row in logits.tolist()]
        (HERE / "logits.json").write_text(json.dumps({"tokens": tokens, "logits": rows}))
        (HERE / "latest_checkpointed_iteration.txt").write_text("5")
    dist.barrier()


if __name__ == "__main__":
    processes = [multiprocessing.Process(target=work, args=(rank,)) for rank in range(TP)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
