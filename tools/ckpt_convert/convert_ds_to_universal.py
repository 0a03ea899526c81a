"""Makes a DeepSpeed checkpoint universal, where DeepSpeed's own tool puts it.

    HL_LATEST_CHECKPOINT=checkpoints/global_step100 python tools/ckpt_convert/convert_ds_to_universal.py

writes checkpoints/global_step100_universal and checkpoints/latest_universal. It is tools/convert_checkpoint.py
--from deepspeed --to universal; both read and write one tensor at a time and need no workers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.files import replace_synced
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model, summary
from megatron.training.failures import run_to_exit


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = result.add_argument
    variable = os.environ.get("HL_LATEST_CHECKPOINT")
    add("--input_folder", type=Path, default=variable, help="checkpoint (default: HL_LATEST_CHECKPOINT)")
    add("--output_folder", type=Path, help="folder to write (default: that of the checkpoint with _universal)")
    add("--hf-config", type=Path, help="config.json of the model, if the checkpoint does not describe it")
    add("--vocab-size", type=int, help="tokens without padding, if the checkpoint does not say")
    add("--no-pipeline-parallel", action="store_true", help="the run that will load it has no pipeline modules")
    add("--num_extract_workers", type=int, help="without effect: HL_UNIV_CP_EXTRACT_WORKERS of the original")
    add("--num_merge_workers", type=int, help="without effect: HL_UNIV_CP_MERGE_WORKERS of the original")
    return result


def main() -> None:
    """Convert one checkpoint."""
    args = parser().parse_args()
    started = time.monotonic()
    if args.input_folder is None:
        raise CheckpointError("give --input_folder, or set HL_LATEST_CHECKPOINT")
    source = Path(args.input_folder)
    target = args.output_folder or source.with_name(f"{source.name}_universal")
    model = open_model(source, "deepspeed", ReadOptions(config=args.hf_config, vocab_size=args.vocab_size))
    whole = target.with_name(f".{target.name}.parts")
    options = WriteOptions(dialect="megatron" if args.no_pipeline_parallel else None)
    if target.exists():
        raise CheckpointError(f"{target} is there already: give another --output_folder, or remove it")
    convert(model, "universal", whole, options)
    next(whole.glob("global_step*_universal")).rename(target)
    replace_synced(target.parent / "latest_universal", target.name.encode())
    shutil.rmtree(whole)
    print(summary(model, target, time.monotonic() - started))


if __name__ == "__main__":
    run_to_exit(main)
