r"""Plans a training run before it is started: memory of every rank, traffic, time of a step; see docs/planning.md.

    python tools/plan.py --preset llama2-70b --world-size 32 --machine gaudi2 --bf16 \
        --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --sequence-parallel

Exit code 0: it fits; 1: it does not fit, or cannot be; 2: wrong usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.planner.command import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
        sys.exit(0)
    except ValueError as problem:
        sys.stderr.write(f"{problem}\n")
        sys.exit(2)
