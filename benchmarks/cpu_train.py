"""Training speed and peak memory on a CPU against Hugging Face's LlamaForCausalLM with the same optimizer.

    python -m benchmarks.cpu_train --dtype float32 bfloat16 --rounds 5 --steps 3

Both train the same LLaMA on the same token ids with clipping and fused AdamW. Each side is a process of its own; they
take turns, and medians over the rounds are compared, because shared machines are noisy. With bfloat16 both keep float32
master weights: ours through the native engine, Hugging Face's through torch.autocast; `hf-pure` has no master weights
(the whole model in bfloat16: less memory, less precise).
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
from dataclasses import asdict, dataclass
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
    threads: int = 2

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq * self.batch


def ours(case: Case) -> Callable[[int], float]:
    """A function that trains one step of our model and returns the loss."""
    import torch

    from megatron.config.run import parse
    from megatron.data.batch import Batch
    from megatron.training.build import build_engine
    from megatron.training.engine import StepSettings
    from megatron.training.setup import start

    flags = {
        **{"--num-layers": case.layers, "--hidden-size": case.hidden, "--num-attention-heads": case.heads},
        **{"--num-key-value-heads": case.kv_heads, "--ffn-hidden-size": case.ffn, "--vocab-size": case.vocab - 1},
        **{"--seq-length": case.seq, "--micro-batch-size": case.batch, "--train-iters": 1, "--lr": LR},
        **{"--attention-dropout": 0, "--hidden-dropout": 0, "--position-embedding-type": "rope"},
        **{"--normalization": "rmsnorm", "--clip-grad": CLIP, "--device": "cpu"},
    }
    words = [str(word) for pair in flags.items() for word in pair]
    words += ["--mock-data", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    words += ["--bf16"] if case.dtype == "bfloat16" else []
    config = parse(words, {})
    session = start(config, {})
    engine = build_engine(config, session, config.architecture(case.vocab))

    def step(seed: int) -> float:
        ids = _ids(case, seed)
        mask = torch.ones(case.batch, case.seq)
        batch = Batch(tokens=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous(), loss_mask=mask)
        return engine.train_step([batch], StepSettings(lr=LR, weight_decay=0.01)).loss

    return step


def hugging_face(case: Case, *, pure: bool = False) -> Callable[[int], float]:
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
    model = LlamaForCausalLM(config)
    if pure:
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    autocast = case.dtype == "bfloat16" and not pure

    def step(seed: int) -> float:
        ids = _ids(case, seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
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
    return torch.randint(0, case.vocab - 1, (case.batch, case.seq + 1), generator=generator)


SIDES: dict[str, Callable[[Case], Callable[[int], float]]] = {
    "ours": ours,
    "hf": hugging_face,
    "hf-pure": lambda case: hugging_face(case, pure=True),
}


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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((time.perf_counter() - began, loss, peak))
    os._exit(0)


def measure(case: Case, sides: list[str], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Median tokens per second, last loss and peak memory (bytes) of each side."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in sides:
        here, there = context.Pipe()
        context.Process(target=worker, args=(side, case, there), daemon=True).start()
        here.send(1)  # the first step allocates
        here.recv()
        pipes[side] = here
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, pipe in pipes.items():
            pipe.send(steps)
            found[side].append(pipe.recv())
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


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="times that each side takes its turn")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    results = []
    for dtype in args.dtype:
        case = Case(dtype=dtype, threads=args.threads, seq=args.seq)
        sides = ["ours", "hf"] + (["hf-pure"] if dtype == "bfloat16" else [])
        found = measure(case, sides, args.rounds, args.steps)
        for side, figures in found.items():
            ratio = found["ours"]["tokens_per_second"] / figures["tokens_per_second"]
            print(
                f"{dtype:9} {side:8} {figures['tokens_per_second']:8.0f} tokens/s   ours is {ratio:.2f}x   "
                f"peak {figures['peak_bytes'] / 2**20:6.0f} MiB   loss {figures['loss']:.4f}",
                flush=True,
            )
        results.append({"case": asdict(case), "rounds": args.rounds, "steps": args.steps, "found": found})
    if args.json is not None:
        import torch
        import transformers

        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        args.json.write_text(json.dumps({"versions": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
