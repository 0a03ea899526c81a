"""Converts checkpoints between formats, one tensor at a time.

    python tools/convert_checkpoint.py --to native --load Llama-3.1-8B --save checkpoints/llama
    python tools/convert_checkpoint.py --to hf --load checkpoints/llama --save exported

docs/converting.md describes the formats.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from megatron.checkpoint.formats import FORMATS, ReadOptions, WriteOptions, convert, open_model
from megatron.training.failures import run_to_exit

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = result.add_argument
    add("--from", dest="source", choices=FORMATS, help="format of --load (default: what the folder looks like)")
    add("--to", dest="target", choices=FORMATS, required=True, help="format of --save")
    add("--load", type=Path, required=True, help="folder of the checkpoint")
    add("--save", type=Path, required=True, help="folder to write, which must not exist or be empty")
    add("--ckpt-step", type=int, help="iteration of the checkpoint in --load (default: the latest)")
    add("--target-tensor-parallel-size", type=int, default=1, help="tensor-parallel ranks to split for")
    add("--target-pipeline-parallel-size", type=int, default=1, help="pipeline stages to split for")
    add("--make-vocab-size-divisible-by", type=int, default=128, help="as for training; added rows are zero")
    add("--dialect", help="names of the tensors (default: those of the first program of the format)")
    add("--dtype", choices=_DTYPES, help="of the weights (default: as they are)")
    add("--hf-config", type=Path, help="config.json of the model, if --load does not describe it")
    add("--vocab-size", type=int, help="tokens without padding, if --load does not say")
    add("--tokenizer-model", type=Path, help="tokenizer file or folder to carry along instead of the one in --load")
    add("--no-optimizer", action="store_true", help="convert the weights alone")
    add("--average-replicas", action="store_true", help="average copies that should be equal and are not")
    add("--max-shard-size", type=float, default=5.0, help="largest file of a Hugging Face folder, in GB (10^9 bytes)")
    return result


def main() -> None:
    """Convert one checkpoint."""
    args = parser().parse_args()
    started = time.monotonic()
    source = ReadOptions(
        iteration=args.ckpt_step,
        config=args.hf_config,
        vocab_size=args.vocab_size,
        average_replicas=args.average_replicas,
        optimizer=FORMATS[args.target].moments and not args.no_optimizer,
        tokenizer=args.tokenizer_model,
    )
    target = WriteOptions(
        tp=args.target_tensor_parallel_size,
        pp=args.target_pipeline_parallel_size,
        divisible_by=args.make_vocab_size_divisible_by,
        dialect=args.dialect,
        dtype=_DTYPES[args.dtype] if args.dtype else None,
        max_shard_bytes=math.ceil(args.max_shard_size * 1e9),
    )
    model = open_model(args.load, args.source, source)
    convert(model, args.target, args.save, target)
    size = model.weights.bytes + sum(tensors.bytes for tensors in model.moments.values())
    seconds = time.monotonic() - started
    print(
        f"{args.save}: {model.arch.num_parameters():,} parameters, {size / 1e6:,.1f} MB in {seconds:.1f} s "
        f"({size / 1e6 / seconds:,.0f} MB/s)"
    )


if __name__ == "__main__":
    run_to_exit(main)
