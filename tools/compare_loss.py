"""Compare the losses of two runs: `python tools/compare_loss.py REFERENCE CANDIDATE --output picture.png`.

Either is a file of metrics (--log-json) or the log of a run, of this trainer or of another Megatron. Ends with 0 if
every loss is within the threshold, with 1 if one is not, and with 2 if the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.compare import THRESHOLD, compare, read_curve, report
from megatron.training.compare_plot import plot_comparison
from megatron.training.report import ReportError


def main(arguments: list[str] | None = None) -> int:
    """Say how far the runs are apart, and draw it if asked to."""
    parser = argparse.ArgumentParser(description="Compare the losses of two runs, iteration by iteration.")
    parser.add_argument("reference", type=Path, help="metrics or log of the run that is right")
    parser.add_argument("candidate", type=Path, help="metrics or log of the run that is judged")
    parser.add_argument(
        "--threshold", type=_fraction, default=THRESHOLD, help="largest relative error allowed: 0.02 or 2%% (2%%)"
    )
    parser.add_argument("--each", action="store_true", help="print every iteration")
    parser.add_argument("--output", type=Path, help="picture of both curves and the error (png, svg, pdf)")
    parser.add_argument("--names", nargs=2, metavar="NAME", help="what the two runs are called in the picture")
    parser.add_argument("--title", default="", help="text above the picture")
    asked = parser.parse_args(arguments)
    try:
        result = compare(read_curve(asked.reference), read_curve(asked.candidate), asked.threshold)
        sys.stdout.write("\n".join(report(result, each=asked.each)) + "\n")
        if asked.output:
            names = tuple(asked.names or (str(asked.reference), str(asked.candidate)))
            plot_comparison(result, asked.output, names=names, title=asked.title)
            sys.stdout.write(f"{asked.output}\n")
    except ReportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0 if result.passed else 1


def _fraction(text: str) -> float:
    """A number such as 0.02 or 2%."""
    value = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
