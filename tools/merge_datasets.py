"""Joins all `.bin/.idx` corpora of a folder into one.

python tools/merge_datasets.py --input FOLDER --output-prefix PREFIX
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron.data.errors import DataError
from megatron.data.indexed_writer import merge_datasets


def main() -> int:
    """Merge in the order of the file names, as Megatron does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="folder with the .bin/.idx pairs to join")
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the result, without .bin and .idx")
    args = parser.parse_args()
    try:
        merge_datasets(corpora(args.input), args.output_prefix)
    except DataError as error:
        parser.error(str(error))
    return 0


def corpora(folder: Path) -> list[Path]:
    """The prefixes of all pairs in a folder, sorted; a file without its other half is refused."""
    found = sorted(path for path in folder.glob("*") if path.suffix in (".bin", ".idx"))
    prefixes = sorted({path.with_suffix("") for path in found})
    if not prefixes:
        raise DataError(f"{folder} holds no .bin/.idx pairs.")
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            if prefix.with_name(prefix.name + suffix) not in found:
                raise DataError(f"{prefix}{suffix} is missing.")
    return prefixes


if __name__ == "__main__":
    sys.exit(main())
