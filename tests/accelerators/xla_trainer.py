"""The trainer where PyTorch/XLA calls its CPU a Trainium core: `test_xla_compilation.py` runs it.

Nothing else of torch_xla is replaced, and nothing of the trainer.
"""

from __future__ import annotations

import torch_xla.runtime

from megatron.training.failures import run_to_exit
from pretrain_gpt import main

if __name__ == "__main__":
    torch_xla.runtime.device_type = lambda: "NEURON"
    run_to_exit(main)
