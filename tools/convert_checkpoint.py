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
from typing import get_args

import torch

from megatron.checkpoint.formats import FORMATS, ReadOptions, WriteOptions, convert, open_model, summary
from megatron.checkpoint.formats.options import Style
from megatron.training.failures import run_to_exit

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ORDERS = {"tiled": True, "adjacent": False}


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
    add("--checkpoint-version", type=float, help="of Megatron's format, if --load is wrong about it")
    add("--tokenizer-model", type=Path, help="tokenizer file or folder to carry along instead of the one in --load")
    add("--no-optimizer", action="store_true", help="convert the weights alone")
    add("--average-replicas", action="store_true", help="average copies that should be equal and are not")
    add("--max-shard-size", type=float, default=5.0, help="largest file of a Hugging Face folder, in GB (10^9 bytes)")
    group = result.add_argument_group("NeuronX Distributed")
    add = group.add_argument
    add("--kv-size-multiplier", type=int, help="copies of each key-value head (default: as few as will do)")
    add("--attention", choices=get_args(Style), help="how query, key and value are stored (default: as its LLaMA does)")
    add(
        "--kv-order",
        choices=_ORDERS,
        default="tiled",
        help="order of the copies to write: tiled (trn1), adjacent (trn2)",
    )
    add("--query-order", choices=_ORDERS, help="order of query heads in --load (default: that of its key-value heads)")
    return result


def main() -> None:
    """Convert one checkpoint."""
    args = parser().parse_args()
    started = time.monotonic()
    source = ReadOptions(
        iteration=args.ckpt_step,
        config=args.hf_config,
        vocab_size=args.vocab_size,
        version=args.checkpoint_version,
        average_replicas=args.average_replicas,
        optimizer=FORMATS[args.target].moments and not args.no_optimizer,
        tokenizer=args.tokenizer_model,
        query_tiled=_ORDERS.get(args.query_order),
    )
    target = WriteOptions(
        tp=args.target_tensor_parallel_size,
        pp=args.target_pipeline_parallel_size,
        divisible_by=args.make_vocab_size_divisible_by,
        dialect=args.dialect,
        dtype=_DTYPES.get(args.dtype),
        max_shard_bytes=math.ceil(args.max_shard_size * 1e9),
        kv_size_multiplier=args.kv_size_multiplier,
        attention=args.attention,
        kv_tiled=_ORDERS[args.kv_order],
    )
    model = open_model(args.load, args.source, source)
    convert(model, args.target, args.save, target)
    print(summary(model, args.save, time.monotonic() - started))


if __name__ == "__main__":
    run_to_exit(main)
