"""Training speed and peak memory of one device against Hugging Face's LlamaForCausalLM with the same optimizer.

    python -m benchmarks.train --dtype float32 bfloat16 --rounds 5 --steps 3
    python -m benchmarks.train --device cuda --model 1b --dtype bfloat16 --sides ours ours-compiled ours-fp8 hf

Both train the same LLaMA on the same token ids with clipping and fused AdamW. Each side is a process of its own; they
take turns, and medians over the rounds are compared, because shared machines are noisy. With bfloat16 both keep float32
master weights: ours through the native engine, Hugging Face's through torch.autocast; `hf-pure` has no master weights
(the whole model in bfloat16: less memory, less precise).

Peak memory is that of torch's allocator on a GPU, and that of the process on a CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

CLIP = 1.0
LR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """The model and the batch."""

    layers: int = 12
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 8
    ffn: int = 1376
    vocab: int = 8192
    seq: int = 512
    batch: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq * self.batch


MODELS = {
    "small": Case(),
    "1b": Case(layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=128256, seq=4096),
    "7b": Case(layers=32, hidden=4096, heads=32, kv_heads=32, ffn=11008, vocab=32000, seq=4096, batch=1),
}
"""A model for two CPU cores, the sizes of LLaMA 3.2 1B, and those of LLaMA 2 7B."""


def flags(case: Case) -> list[str]:
    """The command line of our side."""
    numbers = {
        **{"--num-layers": case.layers, "--hidden-size": case.hidden, "--num-attention-heads": case.heads},
        **{"--num-key-value-heads": case.kv_heads, "--ffn-hidden-size": case.ffn, "--vocab-size": case.vocab - 1},
        **{"--seq-length": case.seq, "--micro-batch-size": case.batch, "--train-iters": 1, "--lr": LR},
        **{"--attention-dropout": 0, "--hidden-dropout": 0, "--position-embedding-type": "rope"},
        **{"--normalization": "rmsnorm", "--clip-grad": CLIP, "--device": case.device},
    }
    words = [str(word) for pair in numbers.items() for word in pair]
    words += ["--mock-data", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    return words + (["--bf16"] if case.dtype == "bfloat16" else [])


def ours(case: Case, *more: str) -> Callable[[int], float]:
    """A function that trains one step of our model, with more flags, and returns the loss."""
    import torch

    from megatron.config.run import parse
    from megatron.data.batch import Batch
    from megatron.training.build import build_engine
    from megatron.training.engine import StepSettings
    from megatron.training.setup import start

    config = parse([*flags(case), *more], {})
    session = start(config, {})
    engine = build_engine(config, session, config.architecture(case.vocab))

    def step(seed: int) -> float:
        ids = _ids(case, seed)
        mask = torch.ones(case.batch, case.seq, device=case.device)
        batch = Batch(tokens=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous(), loss_mask=mask)
        return engine.train_step([batch], StepSettings(lr=LR, weight_decay=0.01)).loss

    return step


def hugging_face(case: Case, *, pure: bool = False, compiled: bool = False) -> Callable[[int], float]:
    """A function that trains one step of Hugging Face's model and returns the loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        vocab_size=case.vocab,
        max_position_embeddings=case.seq,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(case.device):
        model: Any = LlamaForCausalLM(config)
    if pure:
        model = model.to(torch.bfloat16)
    if compiled:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    autocast = case.dtype == "bfloat16" and not pure

    def step(seed: int) -> float:
        ids = _ids(case, seed)
        with torch.autocast(case.device, torch.bfloat16, enabled=autocast):
            logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _ids(case: Case, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, case.vocab - 1, (case.batch, case.seq + 1), generator=generator).to(case.device)


SIDES: dict[str, Callable[[Case], Callable[[int], float]]] = {
    "ours": ours,
    "ours-compiled": lambda case: ours(case, "--use-torch-compile"),
    "ours-fp8": lambda case: ours(case, "--fp8-format", "hybrid"),
    "hf": hugging_face,
    "hf-compiled": lambda case: hugging_face(case, compiled=True),
    "hf-pure": lambda case: hugging_face(case, pure=True),
}


def peak_bytes(device: str) -> int:
    """The largest memory this process has used so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    from megatron import accelerators

    return accelerators.load(device).memory_stats().max_allocated


def flops_per_token(case: Case) -> float:
    """What training needs mathematically, see `megatron.training.flops`."""
    from megatron.config.run import parse
    from megatron.training.flops import forward_flops

    return 3 * forward_flops(parse(flags(case), {}).architecture(case.vocab), case.seq).total / case.seq


def worker(side: str, case: Case, pipe: multiprocessing.connection.Connection) -> None:
    """Train as many steps as are asked for and answer with seconds, loss and peak memory, until asked for none."""
    import torch

    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    step, seed = SIDES[side](case), 0
    while steps := pipe.recv():
        began = time.perf_counter()
        for _ in range(steps):
            seed += 1
            loss = step(seed)
        pipe.send((time.perf_counter() - began, loss, peak_bytes(case.device)))
    os._exit(0)


def measure(case: Case, sides: list[str], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Median tokens per second, last loss and peak memory (bytes) of each side."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in sides:
        here, there = context.Pipe()
        context.Process(target=worker, args=(side, case, there), daemon=True).start()
        there.close()
        _turn(side, here, 1)  # the first step allocates and compiles
        pipes[side] = here
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, pipe in pipes.items():
            found[side].append(_turn(side, pipe, steps))
    for pipe in pipes.values():
        pipe.send(0)
    return {
        side: {
            "tokens_per_second": statistics.median(case.tokens * steps / seconds for seconds, _, _ in answers),
            "loss": answers[-1][1],
            "peak_bytes": answers[-1][2],
        }
        for side, answers in found.items()
    }


def _turn(side: str, pipe: multiprocessing.connection.Connection, steps: int) -> tuple[float, float, float]:
    pipe.send(steps)
    try:
        seconds, loss, peak = pipe.recv()
    except EOFError:
        raise SystemExit(f"{side}: its process ended; the reason stands above") from None
    return seconds, loss, peak


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="as pretrain_gpt.py takes it")
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--sides", nargs="+", default=["ours", "hf"], choices=SIDES)
    parser.add_argument("--rounds", type=int, default=5, help="times that each side takes its turn")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seq", type=int, help="tokens of a sample, instead of the model's own")
    parser.add_argument("--batch", type=int, help="samples of a step, instead of the model's own")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    sizes = {name: value for name in ("seq", "batch") if (value := getattr(args, name)) is not None}
    results = []
    for dtype in args.dtype:
        case = replace(MODELS[args.model], dtype=dtype, device=args.device, threads=args.threads, **sizes)
        found = measure(case, args.sides, args.rounds, args.steps)
        _report(case, found)
        results.append({"case": asdict(case), "rounds": args.rounds, "steps": args.steps, "found": found})
    if args.json is not None:
        args.json.write_text(json.dumps({"versions": _versions(), "results": results}, indent=1) + "\n")


def _report(case: Case, found: dict[str, dict[str, float]]) -> None:
    flops = flops_per_token(case)
    first, *_ = found
    for side, figures in found.items():
        speed = figures["tokens_per_second"]
        ratio = found[first]["tokens_per_second"] / speed
        print(
            f"{case.dtype:9} {side:14} {speed:8.0f} tokens/s {speed * flops / 1e12:8.2f} TFLOP/s   "
            f"{first} is {ratio:.2f}x   peak {figures['peak_bytes'] / 2**20:6.0f} MiB   loss {figures['loss']:.4f}",
            flush=True,
        )


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
