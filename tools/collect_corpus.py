"""Collect real text that every machine with Python has: the sources and manuals of the standard library.

The result is one JSON object per line, `{"text": ...}`, one document per module or help topic, in a fixed order: the
same Python gives the same file. Enough to train a tokenizer and a small model without a download.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Not the standard library, or tables and generated code rather than language.
_LEFT_OUT = {"site-packages", "dist-packages", "pydoc_data", "encodings", "__phello__"}
# Tests repeat themselves.
_TESTS = {"test", "tests", "idle_test"}


def modules(stdlib: Path, *, include_tests: bool) -> Iterator[str]:
    """The source text of every module, ordered by path; files that are not UTF-8 are left out."""
    left_out = _LEFT_OUT if include_tests else _LEFT_OUT | _TESTS
    for file in sorted(stdlib.rglob("*.py")):
        if file.is_file() and left_out.isdisjoint(file.relative_to(stdlib).parts[:-1]):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                yield text


def topics() -> Iterator[str]:
    """The chapters of the language reference that `help()` shows, in order of their names."""
    pages: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield from (pages[name] for name in sorted(pages))


def main() -> None:
    """Write the corpus and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="jsonl file to write")
    parser.add_argument("--include-tests", action="store_true", help="about twice as much text, and more monotonous")
    args = parser.parse_args()
    stdlib = Path(sysconfig.get_path("stdlib"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.output.with_name(args.output.name + ".part")
    documents = 0
    with unfinished.open("w", encoding="utf-8", newline="\n") as stream:
        for part in (topics(), modules(stdlib, include_tests=args.include_tests)):
            for text in part:
                stream.write(json.dumps({"text": text}) + "\n")
                documents += 1
    unfinished.replace(args.output)
    print(f"{args.output}: {documents} documents, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
