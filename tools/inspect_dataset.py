"""Say what .bin/.idx datasets hold and what is wrong with them; the exit code is 1 if something is.

python tools/inspect_dataset.py my_text_document --vocab-size 32000 --histogram lengths.png --text 2 ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.errors import DataError
from megatron.data.inspection import Inspection, checksum, draw_histogram, inspect_dataset
from megatron.tokenizer import Tokenizer, TokenizerError, build_tokenizer
from megatron.tokenizer.flags import add_tokenizer_flags, tokenizer_settings


def build_parser() -> argparse.ArgumentParser:
    """The command line; without a tokenizer, --vocab-size and --eod say what is known of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", help="paths without .bin and .idx")
    parser.add_argument("--eod", type=int, help="id of the token that ends documents")
    parser.add_argument("--checksum", action="store_true", help="print SHA-256 sums of the files")
    parser.add_argument("--histogram", type=Path, help="PNG of the lengths (for one prefix)")
    parser.add_argument("--text", type=int, default=0, help="show the beginning of that many documents, as text")
    add_tokenizer_flags(parser, required=False)
    return parser


def _show(found: Inspection, number: int, tokenizer: Tokenizer) -> None:
    assert found.data is not None
    documents = found.data.index.documents
    for document in range(min(number, len(documents) - 1)):
        ids = [int(token) for s in range(documents[document], documents[document + 1]) for token in found.data[s][:100]]
        print(f"  document {document}: {tokenizer.decode([token for token in ids if token >= 0][:100])!r}")


def main() -> int:
    """Inspect; returns the exit code."""
    args = build_parser().parse_args()
    if args.histogram and len(args.prefixes) > 1:
        print("error: --histogram draws one prefix", file=sys.stderr)
        return 2
    problems = 0
    try:
        tokenizer = build_tokenizer(tokenizer_settings(args)) if args.tokenizer_type else None
        if args.text and tokenizer is None:
            raise TokenizerError("--text needs the tokenizer: --tokenizer-type ...")
        size = args.vocab_size if tokenizer is None else tokenizer.vocab_size
        eod = args.eod if tokenizer is None or args.eod is not None else tokenizer.eod
        for prefix in args.prefixes:
            found = inspect_dataset(prefix, vocab_size=size, eod=eod)
            print("\n".join(found.lines()))
            problems += len(found.problems)
            if found.data is None:
                continue
            if tokenizer is not None:
                _show(found, args.text, tokenizer)
            if args.checksum:
                print("\n".join(checksum(prefix)))
            if args.histogram:
                draw_histogram(prefix, args.histogram)
    except (DataError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
