"""Turn jsonl and txt files into the .bin/.idx datasets that training reads.

Writes `{output-prefix}_{key}_document.bin` and `.idx` for every JSON key. The files are the same for any number of
workers, keep the order of the input, and appear under their names only when they are complete.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.errors import DataError
from megatron.data.preprocess import EncodePlan, PreprocessSettings, Summary, WorkerError, preprocess
from megatron.tokenizer import TokenizerError
from megatron.tokenizer.flags import add_tokenizer_flags, tokenizer_settings

_REFUSED = {
    "--split-sentences": "sentences are for BERT and T5; documents of decoder-only models stay whole",
    "--keep-newlines": "it belongs to --split-sentences, and documents keep their newlines in any case",
    "--lang": "it belongs to --split-sentences",
}
_WITHOUT_EFFECT = {
    "--partitions": "the input is never split into temporary files, so there is nothing to merge",
    "--keep-sequential-samples": "documents always keep their order",
    "--seq-length": "documents are never cut here; the sequence length is chosen when training",
    "--trust-remote-code": "code from a tokenizer's folder is never run",
}


def _refuse(flag: str, reason: str) -> type[argparse.Action]:
    """An argparse action that ends with a reason."""

    class Refuse(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
            parser.error(f"{flag} is not supported: {reason}")

    return Refuse


def build_parser() -> argparse.ArgumentParser:
    """Megatron's command line, with its spellings and defaults where they make sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("input")
    data.add_argument("--input", required=True, nargs="+", help="files or quoted patterns; .gz is recognised")
    data.add_argument("--json-keys", nargs="+", default=["text"], help="fields of a record, a dataset each")
    data.add_argument("--text-unit", choices=["line", "file"], default="line", help="what a document is in a .txt file")
    data.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="at a record that is no valid JSON or UTF-8, lacks a key or is empty: end, or leave it out and count it",
    )
    add_tokenizer_flags(parser)
    parser.add_argument("--append-eod", action="store_true", help="end every document with the EOD token")
    output = parser.add_argument_group("output and running")
    output.add_argument("--output-prefix", required=True, help="path of the datasets without '_{key}_document.bin'")
    output.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="format of the datasets")
    output.add_argument("--workers", type=int, default=1, help="processes that encode")
    output.add_argument("--log-interval", type=int, default=1000, help="documents between two lines in a log")
    legacy = parser.add_argument_group("for old scripts", "; ".join(f"{k}: {v}" for k, v in _WITHOUT_EFFECT.items()))
    legacy.add_argument("--partitions", "--seq-length", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    legacy.add_argument(
        "--keep-sequential-samples",
        "--trust-remote-code",
        action="store_true",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    for flag, reason in _REFUSED.items():
        parser.add_argument(flag, nargs="?", action=_refuse(flag, reason), help=argparse.SUPPRESS)
    return parser


def read_settings(argv: Sequence[str]) -> PreprocessSettings:
    """The settings that a command line asks for."""
    args = build_parser().parse_args(argv)
    return PreprocessSettings(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        plan=EncodePlan(tokenizer=tokenizer_settings(args), keys=tuple(args.json_keys), append_eod=args.append_eod),
        workers=args.workers,
        text_unit=args.text_unit,
        on_error=args.on_error,
        log_interval=args.log_interval,
    )


def _report(summary: Summary) -> None:
    for line in summary.skipped_lines():
        print(line, file=sys.stderr)
    print(summary.last_line, file=sys.stderr)
    for key, prefix in summary.prefixes.items():
        print(f"{prefix}.bin, .idx: {summary.documents} documents, {summary.tokens[key]} tokens", file=sys.stderr)


def main() -> int:
    """Preprocess; returns the exit code."""
    # One thread per process: --workers says how many cores are used, and child processes inherit this.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A polite end from outside takes the same way out as Ctrl-C, which removes unfinished files and ends the workers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for flag, reason in _WITHOUT_EFFECT.items():
        if any(word == flag or word.startswith(f"{flag}=") for word in sys.argv[1:]):
            print(f"{flag} changes nothing: {reason}", file=sys.stderr)
    try:
        settings = read_settings(sys.argv[1:])
        _report(preprocess(settings, log=sys.stderr))
    except (DataError, TokenizerError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; no dataset was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
