r"""Continues texts with a trained model.

    python tools/generate_text.py --load runs/cpu_llama/checkpoints --prompt "def read_lines(path):"
    torchrun --nproc-per-node 4 tools/generate_text.py --load Llama-3.1-8B --tensor-model-parallel-size 4 \
        --prompts questions.jsonl --output answers.jsonl --temperature 0

--load is a checkpoint in any format that tools/convert_checkpoint.py reads. docs/generating.md describes the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from megatron.checkpoint.formats import FORMATS, ReadOptions
from megatron.generation import BeamSettings, Sampling, SamplingError
from megatron.generation.prompts import from_first_rank, read_prompts
from megatron.generation.restore import TokenizerChoice, open_source, restore
from megatron.generation.session import rank_of, start
from megatron.generation.write import Wishes, Written, write
from megatron.tokenizer import TOKENIZER_TYPES
from megatron.training.failures import run_to_exit

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEMPERATURE, _TOP_P = 0.8, 0.95


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = result.add_argument_group("model").add_argument
    add("--load", type=Path, required=True, help="folder of the checkpoint, in any format")
    add("--from", dest="source", choices=FORMATS, help="its format (default: what the folder looks like)")
    add("--ckpt-step", type=int, help="iteration of the checkpoint (default: the latest)")
    add("--hf-config", type=Path, help="config.json of the model, if the checkpoint does not describe it")
    add("--vocab-size", type=int, help="tokens without padding, if the checkpoint does not say")
    add("--tokenizer-model", help="where the tokenizer is (default: with the checkpoint, or where it was in training)")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, help="its kind, as for pretrain_gpt.py")
    add("--device", default="auto", help="as for pretrain_gpt.py")
    add("--dtype", choices=_DTYPES, help="of the computation (default: that of the weights)")
    add("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each layer")
    add("--pipeline-model-parallel-size", type=int, default=1, help="groups of layers, each on its own ranks")
    add = result.add_argument_group("prompts and output").add_argument
    add("--prompt", action="append", default=[], help="text to continue; may be given several times")
    add("--prompts", type=Path, help='file with one per line, or .jsonl with {"prompt": ...}; - for standard input')
    add("--batch-size", type=int, default=8, help="prompts that are continued at a time")
    add("--output", type=Path, help="also write it to this file: as text, or JSON lines if it is called *.jsonl")
    add("--json", action="store_true", help="print JSON lines: prompt, text, tokens, reason why it ended")
    add = result.add_argument_group("choice of tokens").add_argument
    add("--max-new-tokens", type=int, default=100, help="tokens to write at most")
    add("--temperature", type=float, help=f"0 = always the most likely token (default: {_TEMPERATURE})")
    add("--top-k", type=int, default=0, help="choose among the k most likely tokens; 0 = all")
    add("--top-p", type=float, help=f"choose among the most likely tokens with this probability (default: {_TOP_P})")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that the text has are less likely")
    add("--seed", type=int, default=1234, help="of the choice; a text does not depend on the other prompts")
    add("--num-beams", type=int, default=1, help="above 1: search the most likely text, with so many at a time")
    add("--length-penalty", type=float, default=1.0, help="of the search: 0 favours short texts, above 1 long ones")
    add("--stop", action="append", default=[], help="text that ends what is written; may be given several times")
    add("--ignore-eos", action="store_true", help="go on behind the end of a text")
    return result


def wishes_of(args: argparse.Namespace) -> Wishes:
    """What the command line asks for.

    Raises:
        SamplingError: it contradicts itself.
    """
    choice: Sampling | BeamSettings
    if args.num_beams == 1:
        choice = Sampling(
            temperature=_TEMPERATURE if args.temperature is None else args.temperature,
            top_k=args.top_k,
            top_p=_TOP_P if args.top_p is None else args.top_p,
            repetition_penalty=args.repetition_penalty,
        )
    elif args.temperature or args.top_k or args.top_p is not None:
        raise SamplingError("--num-beams searches and draws nothing: leave --temperature, --top-k and --top-p out")
    else:
        choice = BeamSettings(
            width=args.num_beams, length_penalty=args.length_penalty, repetition_penalty=args.repetition_penalty
        )
    return Wishes(
        choice=choice,
        new_tokens=args.max_new_tokens,
        stop_words=tuple(args.stop),
        ignore_ends=args.ignore_eos,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def show_piece(piece: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def show_all(results: Iterable[Written], args: argparse.Namespace, *, streamed: bool) -> None:
    """Print the results as they come, and write them to the file that was asked for."""
    lines = args.output is not None and args.output.suffix == ".jsonl"
    with ExitStack() as stack:
        file = None if args.output is None else stack.enter_context(args.output.open("w", encoding="utf-8"))
        for number, result in enumerate(results):
            record = json.dumps(asdict(result), ensure_ascii=False)
            text = ("\n" if number else "") + result.prompt + result.text
            if args.json:
                print(record, flush=True)
            else:
                print("" if streamed else text, flush=True)
            if file is not None:
                file.write((record if lines else text) + "\n")
                file.flush()


def main() -> None:
    """Load the model, print the texts as they are written."""
    args = parser().parse_args()
    wishes = wishes_of(args)
    is_first = rank_of(os.environ) == 0
    prompts = read_prompts(args.prompt, args.prompts, sys.stdin) if is_first else None
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    session = start(args.device, tp=tp, pp=pp, env=os.environ)
    options = ReadOptions(
        iteration=args.ckpt_step,
        config=args.hf_config,
        vocab_size=args.vocab_size,
        optimizer=False,
        log=lambda line: print(line, file=sys.stderr),
    )
    choice = TokenizerChoice(kind=args.tokenizer_type, model=args.tokenizer_model)
    source, tokenizer = open_source(args.load, args.source, options, choice)
    found = restore(source, tokenizer, session, dtype=_DTYPES.get(args.dtype))
    texts = from_first_rank(prompts)
    streamed = is_first and len(texts) == 1 and args.num_beams == 1 and not args.json and sys.stdout.isatty()
    if streamed:
        show_piece(texts[0])
    results = write(found, texts, wishes, show_piece if streamed else None)
    if is_first:
        show_all(results, args, streamed=streamed)
    else:
        deque(results, maxlen=0)


if __name__ == "__main__":
    run_to_exit(main)
