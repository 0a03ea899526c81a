"""Continues a text with a trained model.

    python tools/generate_text.py --load runs/cpu_llama/checkpoints --prompt "def read_lines(path):"

The architecture and the tokenizer are those of the checkpoint, which may have been saved in any layout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatron.accelerators import select
from megatron.generation import Sampling, generate
from megatron.generation.restore import restore
from megatron.ops import build_table
from megatron.training.failures import run_to_exit


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, help="folder of the run's checkpoints")
    parser.add_argument("--ckpt-step", type=int, help="iteration of the checkpoint (default: the latest)")
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now (default: where it was in training)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most likely tokens; 0 = all")
    parser.add_argument("--top-p", type=float, default=0.95, help="choose among the tokens with this probability")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the choice")
    parser.add_argument("--device", default="auto", help="as for pretrain_gpt.py")
    parser.add_argument("--output", type=Path, help="also write the text to this file")
    return parser.parse_args()


def main() -> None:
    """Load the model, print the text as it is written."""
    args = parse()
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    accelerator = select(args.device)
    ops, _ = build_table(accelerator, {})
    device = accelerator.set_device(0)
    found = restore(
        args.load,
        iteration=args.ckpt_step,
        tokenizer_model=args.tokenizer_model,
        ops=ops,
        device=device,
        log=lambda line: print(line, file=sys.stderr),
    )
    written = generate(
        found.model,
        found.tokenizer.encode(args.prompt),
        vocab_size=found.arch.vocab_size,
        max_positions=found.arch.max_positions,
        new_tokens=args.max_new_tokens,
        sampling=sampling,
        eod=found.tokenizer.eod,
        generator=torch.Generator().manual_seed(args.seed),
    )
    text = args.prompt + found.tokenizer.decode(written)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_to_exit(main)
