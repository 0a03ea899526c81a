"""Compare what two runs logged with --log-fwd-activations and the like: `python tools/compare_tensors.py A B`.

Both are folders of --tensor-logger-path. Shows the first tensor above the threshold, in the order in which they were
computed, and the worst ones. Ends with 0 if there is none, with 1 if there is, with 2 if they cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.compare_tensors import CompareError, compare

_WORST = 10


def main(arguments: list[str] | None = None) -> int:
    """Say where two runs part."""
    parser = argparse.ArgumentParser(description="Compare the logged tensors of two runs.")
    parser.add_argument("first", type=Path, help="folder of the run that is right")
    parser.add_argument("second", type=Path, help="folder of the run that is judged")
    parser.add_argument("--threshold", type=float, default=0.0, help="largest relative error allowed (0: equal)")
    parser.add_argument("--each", action="store_true", help="print every tensor")
    asked = parser.parse_args(arguments)
    try:
        entries = compare(asked.first, asked.second)
    except CompareError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    above = [entry for entry in entries if not entry.relative <= asked.threshold]
    lines = [str(entry) for entry in entries] if asked.each else []
    lines.append(f"{len(above)} of {len(entries)} tensors are above the threshold of {asked.threshold:g}")
    if above:
        worst = sorted(above, key=lambda entry: entry.relative, reverse=True)[:_WORST]
        lines += [f"first: {above[0]}", *(f"worst: {entry}" for entry in worst)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
