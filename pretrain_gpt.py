"""Trains a decoder-only language model: GPT, LLaMA, BLOOM, Mistral and their like.

    python pretrain_gpt.py --mock-data --preset llama-tiny ...
    torchrun --nproc_per_node 2 pretrain_gpt.py --tensor-model-parallel-size 2 ...

`--help` lists the flags (Megatron's), docs/settings.md explains them, `--dry-run` prints what they come to.
"""

from __future__ import annotations

import os
import sys

from megatron.config import dump
from megatron.config.run import parse
from megatron.training.failures import run_to_exit


def main() -> None:
    """Parse the command line and run."""
    from megatron.training.checkpoint_args import read_settings

    config = parse(sys.argv[1:], os.environ, read_record=read_settings)
    if config.dry_run:
        sys.stdout.write("\n".join(dump.lines(config)) + "\n")
        return
    from megatron.training.run import run

    run(config)


if __name__ == "__main__":
    run_to_exit(main)
