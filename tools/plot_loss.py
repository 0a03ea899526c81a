"""Draw the loss of a run: `python tools/plot_loss.py RUN/metrics.jsonl`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.plot import plot_loss
from megatron.training.report import ReportError


def main(arguments: list[str] | None = None) -> int:
    """Draw the picture and say where it is; 1 with a message if that is not possible."""
    parser = argparse.ArgumentParser(description="Draw training and validation loss from a metrics file.")
    parser.add_argument("metrics", type=Path, help="file that a run wrote with --log-json")
    parser.add_argument("--output", type=Path, help="picture (png, svg, pdf); default: loss.png beside the metrics")
    parser.add_argument("--title", default="", help="text above the picture")
    asked = parser.parse_args(arguments)
    image = asked.output or asked.metrics.with_name("loss.png")
    try:
        plot_loss(asked.metrics, image, title=asked.title)
    except ReportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{image}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
