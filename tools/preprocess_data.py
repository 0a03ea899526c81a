"""Turn text files, tables and Hugging Face datasets into the .bin/.idx datasets that training reads.

Writes `{output-prefix}_{key}_document.bin` and `.idx` for every JSON key, or the datasets of a handler. The files are
the same for any number of workers, keep the order of the input, and appear under their names only when they are
complete. After a kill or Ctrl-C, the same command goes on where it was.
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
from megatron.data.preprocess.handlers import HANDLER_NAMES, HandlerSettings
from megatron.data.preprocess.sentences import SentenceCutter
from megatron.tokenizer import TokenizerError
from megatron.tokenizer.flags import add_tokenizer_flags, tokenizer_settings

_WITHOUT_EFFECT = {
    "--partitions": "the input is never split into temporary files, so there is nothing to merge",
    "--keep-sequential-samples": "documents always keep their order",
    "--make-vocab-size-divisible-by": "the embedding is padded when training",
    "--pad-vocab-size-to": "the embedding is padded when training",
    "--datasets": "AscendSpeed never reads it",
    "--streaming": "the input is always read as a stream",
    "--seq-length": "documents are never cut here; the sequence length is chosen when training",
    "--trust-remote-code": "code from a tokenizer's folder is never run",
}


def build_parser() -> argparse.ArgumentParser:
    """Megatron's command line, with its spellings and defaults where they make sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("input")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        default=[],
        help="files, folders, quoted patterns or URLs of jsonl, json, txt, csv, tsv, parquet or arrow, plain or .gz, "
        ".zst, .bz2, .xz; folders that Hugging Face's datasets saved; names of datasets on its hub",
    )
    source.add_argument(
        "--hf-datasets-params",
        metavar="FILE",
        help='JSON object with the arguments of Hugging Face\'s datasets.load_dataset, such as {"path": "json", '
        '"data_files": "a.jsonl", "split": "train", "streaming": true}',
    )
    data.add_argument("--json-keys", nargs="+", default=["text"], help="fields of a record, a dataset each")
    data.add_argument("--handler-name", default="GeneralPretrainHandler", help=f"one of {', '.join(HANDLER_NAMES)}")
    data.add_argument(
        "--chat-template", help="of ChatHandler: chatml, vicuna or a Jinja file; default: the tokenizer's"
    )
    data.add_argument("--split-sentences", action="store_true", help="a sequence per sentence: {key}_sentence.bin")
    data.add_argument("--keep-newlines", action="store_true", help="with --split-sentences, keep the space around them")
    data.add_argument("--lang", default="english", help="with --split-sentences, the language")
    data.add_argument("--text-unit", choices=["line", "file"], default="line", help="what a document is in a .txt file")
    data.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="at a record that is no valid JSON or UTF-8, lacks a key or is empty: end, or leave it out and count it",
    )
    add_tokenizer_flags(parser)
    parser.add_argument(
        "--tokenizer-engine",
        choices=["auto", "gigatoken", "own"],
        default="auto",
        help="auto takes gigatoken where its ids are the tokenizer's own, else the tokenizer's own library",
    )
    parser.add_argument(
        "--use-gigatoken", dest="tokenizer_engine", action="store_const", const="gigatoken", help="Megatron-LM's name"
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with the EOD token")
    output = parser.add_argument_group("output and running")
    output.add_argument("--output-prefix", required=True, help="path of the datasets without '_{key}_document.bin'")
    output.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="format of the datasets")
    output.add_argument(
        "--instruction-format",
        choices=["packed", "compact"],
        default="packed",
        help="of instruction handlers: AscendSpeed's three files, or one of prompts and answers in turn",
    )
    output.add_argument("--resume-interval", type=float, default=10.0, help="seconds of work that a kill can cost")
    output.add_argument("--workers", type=int, default=1, help="processes that encode")
    output.add_argument("--log-interval", type=int, default=1000, help="documents between two lines in a log")
    legacy = parser.add_argument_group("for old scripts", "; ".join(f"{k}: {v}" for k, v in _WITHOUT_EFFECT.items()))
    for flag in ("--partitions", "--seq-length", "--make-vocab-size-divisible-by", "--pad-vocab-size-to"):
        legacy.add_argument(flag, type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    legacy.add_argument("--datasets", nargs="+", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    legacy.add_argument(
        "--keep-sequential-samples",
        "--trust-remote-code",
        "--streaming",
        action="store_true",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    return parser


def read_settings(argv: Sequence[str]) -> PreprocessSettings:
    """The settings that a command line asks for."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.split_sentences and (args.keep_newlines or args.lang != "english"):
        parser.error("--keep-newlines and --lang go with --split-sentences, which is missing")
    cutter = SentenceCutter(language=args.lang, keep_newlines=args.keep_newlines) if args.split_sentences else None
    handler = HandlerSettings(
        name=args.handler_name,
        keys=tuple(args.json_keys),
        sentences=cutter,
        chat_template=args.chat_template,
        tokenizer_model=args.tokenizer_model,
    )
    return PreprocessSettings(
        inputs=tuple(args.input),
        hf_datasets_params=args.hf_datasets_params,
        output_prefix=args.output_prefix,
        plan=EncodePlan(
            tokenizer=tokenizer_settings(args),
            handler=handler,
            append_eod=args.append_eod,
            form=args.instruction_format,
        ),
        engine=args.tokenizer_engine,
        workers=args.workers,
        text_unit=args.text_unit,
        on_error=args.on_error,
        log_interval=args.log_interval,
        resume_interval=args.resume_interval,
    )


def _report(summary: Summary) -> None:
    for line in summary.skipped_lines():
        print(line, file=sys.stderr)
    print(summary.last_line, file=sys.stderr)
    for name, prefix in summary.prefixes.items():
        counts = f"{summary.written[name]} documents, {summary.tokens[name]} tokens"
        print(f"{prefix}.bin, .idx: {counts}", file=sys.stderr)


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
        print("error: interrupted; no dataset was written. The same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
