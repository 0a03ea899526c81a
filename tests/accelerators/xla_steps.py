"""Training steps of a small LLaMA through PyTorch/XLA on its CPU, beside the same steps without it; prints JSON.

Run by `test_xla_compilation.py` with a Python that has torch_xla: kernels and optimizer are those of Trainium.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
import torch_xla
import torch_xla.debug.metrics as metrics

from megatron import accelerators
from megatron.config.architecture import Architecture
from megatron.model.gpt import GPT, ModelInputs
from megatron.model.weights import initialise_parameters
from megatron.mpu.groups import single_process
from megatron.ops import build_table

STEPS, MICRO_BATCHES = 20, 2
ARCH = Architecture(
    **{"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_hidden_size": 96},
    **{"vocab_size": 100, "padded_vocab_size": 128, "max_positions": 32, "init_std": 0.1},
)


def _batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        text = torch.randint(ARCH.vocab_size, (2, 33), generator=generator)
        yield text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _train(device: torch.device, *, lazy: bool) -> tuple[list[float], list[int]]:
    """Losses of all steps, and compilations until the end of each."""
    accelerator = accelerators.load("neuron_xla" if lazy else "cpu")
    ops, _ = build_table(accelerator, {})
    model = GPT(ARCH, ops=ops, groups=single_process(), device=device)
    initialise_parameters(model, ARCH, single_process(), seed=1)
    optimizer = ops.adamw([{"params": list(model.parameters())}], lr=1e-3)
    batches, losses, compiled = _batches(), [], []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / STEPS
        total = torch.zeros((), device=device)
        for _ in range(MICRO_BATCHES):
            tokens, labels = (tensor.to(device) for tensor in next(batches))
            logits = model(tokens, ModelInputs())[..., : ARCH.vocab_size]
            loss = ops.cross_entropy(logits, labels.t().contiguous()).mean() / MICRO_BATCHES
            loss.backward()
            total += loss.detach()
            accelerator.end_of_micro_step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        accelerator.end_of_micro_step()
        losses.append(total.item())
        data = metrics.metric_data("CompileTime")
        compiled.append(0 if data is None else int(data[0]))
    return losses, compiled


def main() -> None:
    """Train twice, on XLA first: torch's autograd knows the devices that are there at its first backward pass."""
    lazy, compiled = _train(torch_xla.device(), lazy=True)
    plain, _ = _train(torch.device("cpu"), lazy=False)
    json.dump({"plain": plain, "lazy": lazy, "compiled": compiled, "torch": torch.__version__}, sys.stdout)


if __name__ == "__main__":
    main()
