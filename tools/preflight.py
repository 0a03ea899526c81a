"""Tries what a run needs of this process's node; started by `python -m megatron.launch --check` on all nodes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.launch.preflight import main
from megatron.training.failures import run_to_exit

if __name__ == "__main__":
    run_to_exit(main)
