"""Cut a .bin/.idx dataset into parts of whole documents, or copy it with tokens of another width.

python tools/split_dataset.py --input my_text_document --output-prefix part --split 969,30,1
python tools/split_dataset.py --input my_text_document --output-prefix part --parts 8
python tools/split_dataset.py --input my_text_document --output-prefix narrow --dtype uint16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.rewrite import copy_documents, split_bounds


def main() -> int:
    """Cut or copy; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="prefix, without .bin and .idx")
    parser.add_argument("--output-prefix", required=True, help="the parts are {prefix}_{name}; a copy has this prefix")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--parts", type=int, help="number of parts, of equal numbers of documents")
    how.add_argument("--split", help="proportions of train, valid and test, as in training")
    parser.add_argument("--dtype", choices=["uint16", "int32", "uint8", "int64"], help="width of the tokens")
    args = parser.parse_args()
    if args.parts is None and args.split is None and args.dtype is None:
        parser.error("give --parts, --split or --dtype")
    try:
        source = IndexedDataset(args.input)
        documents = len(source.index.documents) - 1
        outputs = {args.output_prefix: (0, documents)}
        if args.parts is not None or args.split is not None:
            bounds = split_bounds(documents, parts=args.parts, split=args.split)
            outputs = {f"{args.output_prefix}_{name}": (first, last) for name, first, last in bounds}
        for prefix, (first, last) in outputs.items():
            copy_documents(source, first, last, prefix, args.dtype)
            print(f"{prefix}: {last - first} documents")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
