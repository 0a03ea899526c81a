"""Fine-tunes a decoder-only language model on instruction data: answers are learned, prompts are only read.

    python finetune_gpt.py --load CHECKPOINT --finetune --data-path PREFIX --neat-pack ...

This is pretrain_gpt.py with --is-instruction-dataset; tools/preprocess_data.py --handler-name writes the data, and
docs/data.md explains both.
"""

from __future__ import annotations

import os
import sys

from megatron.config import dump
from megatron.config.run import parse
from megatron.training.failures import run_to_exit

_FLAG = "--is-instruction-dataset"


def main() -> None:
    """Parse the command line and run."""
    from megatron.training.checkpoint_args import read_settings

    words = sys.argv[1:]
    config = parse(words if _FLAG in words else [*words, _FLAG], os.environ, read_record=read_settings)
    if config.dry_run:
        sys.stdout.write("\n".join(dump.lines(config)) + "\n")
        return
    from megatron.training.run import run

    run(config)


if __name__ == "__main__":
    run_to_exit(main)
