r"""AscendSpeed's change of the layout of a checkpoint, with AscendSpeed's arguments.

    python tools/ckpt_convert/llama/convert_weights_when_tp_pp_change.py --type 7B --input-model-dir tp8/release \\
        --output-model-dir tp2pp4 --tgt-tensor-model-parallel-size 2 --tgt-pipeline-model-parallel-size 4

The layout of the source is found from its files; where it is given, it is checked. It is tools/convert_checkpoint.py
--from megatron --to megatron.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from pathlib import Path

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model, summary
from megatron.checkpoint.formats.settings import architecture_from_record
from megatron.config.presets import preset
from megatron.training.failures import run_to_exit

PRESETS = {"7B": "llama1-7b", "13B": "llama1-13b", "30B": "llama1-30b", "33B": "llama1-30b", "65B": "llama1-65b"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = result.add_argument
    add("--input-model-dir", type=Path, default=Path("input_model_dir"), help="checkpoint, or folder that holds it")
    add("--output-model-dir", type=Path, default=Path("output_model_dir"), help="folder to write")
    add("--orig-vocab-size", type=int, default=32000, help="tokens without padding")
    add("--make-vocab-size-divisible-by", type=int, default=128, help="as for training")
    for end, title in (("src", "of the source, which is checked"), ("tgt", "to split for")):
        default = 1 if end == "tgt" else None
        add(f"--{end}-tensor-model-parallel-size", type=int, default=default, help=f"tensor-parallel ranks {title}")
        add(f"--{end}-pipeline-model-parallel-size", type=int, default=default, help=f"pipeline stages {title}")
    add("--type", choices=PRESETS, default="7B", help="size of the model")
    add("--hf-config", type=Path, help="config.json of the model, instead of --type")
    add("--dialect", default="ascendspeed", help="names to write, as for tools/convert_checkpoint.py")
    return result


def check_layout(folder: Path, tp: int | None, pp: int | None) -> None:
    """Compare the layout that is claimed with the folders of the ranks.

    Raises:
        CheckpointError: they differ.
    """
    found = [re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.name) for path in folder.rglob("mp_rank_*")]
    for flag, claimed, group in (("tensor", tp, 1), ("pipeline", pp, 2)):
        there = 1 + max((int(match[group] or 0) for match in found if match), default=0)
        if claimed not in (None, there):
            raise CheckpointError(
                f"--src-{flag}-model-parallel-size {claimed}: the checkpoint in {folder} was written for {there}"
            )


def main() -> None:
    """Convert one checkpoint."""
    args = parser().parse_args()
    started = time.monotonic()
    check_layout(args.input_model_dir, args.src_tensor_model_parallel_size, args.src_pipeline_model_parallel_size)
    options = ReadOptions(config=args.hf_config, vocab_size=args.orig_vocab_size, optimizer=False)
    if args.hf_config is None:
        arch = architecture_from_record(preset(PRESETS[args.type]).settings, args.orig_vocab_size)
        options = replace(options, arch=arch)
    model = open_model(args.input_model_dir, "megatron", options)
    target = WriteOptions(
        tp=args.tgt_tensor_model_parallel_size,
        pp=args.tgt_pipeline_model_parallel_size,
        divisible_by=args.make_vocab_size_divisible_by,
        dialect=args.dialect,
    )
    convert(model, "megatron", args.output_model_dir, target)
    print(summary(model, args.output_model_dir, time.monotonic() - started))


if __name__ == "__main__":
    run_to_exit(main)
