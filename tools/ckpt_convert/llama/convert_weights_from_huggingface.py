r"""AscendSpeed's conversion of a Hugging Face LLaMA, with AscendSpeed's arguments.

    python tools/ckpt_convert/llama/convert_weights_from_huggingface.py --type 33B \\
        --input-model-dir llama-33b-hf --output-model-dir llama-33b-tp8 --tensor-model-parallel-size 8

Reads safetensors and .bin, in one file or in shards. Unlike the original it fills the padding of the vocabulary with
zeros, so that the loss does not depend on the number of ranks, and stores grouped key-value heads in Megatron's order.
It is tools/convert_checkpoint.py --from hf --to megatron (--deepspeed: --to deepspeed) --dialect ascendspeed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model, summary
from megatron.checkpoint.formats.model import with_vocabulary
from megatron.config.architecture import Architecture
from megatron.training.failures import run_to_exit

SIZES = {
    "7B": (32, 4096, 32),
    "13B": (40, 5120, 40),
    "30B": (60, 6656, 52),
    "33B": (60, 6656, 52),
    "65B": (80, 8192, 64),
}
"""Layers, hidden size, query heads."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = result.add_argument
    add("--input-model-dir", type=Path, default=Path("input_model_dir"), help="Hugging Face folder")
    add("--output-model-dir", type=Path, default=Path("output_model_dir"), help="folder to write")
    add("--make-vocab-size-divisible-by", type=int, default=128, help="as for training")
    add("--tensor-model-parallel-size", type=int, default=1, help="tensor-parallel ranks to split for")
    add("--pipeline-model-parallel-size", type=int, default=1, help="pipeline stages to split for")
    add("--added-token-num", type=int, default=0, help="tokens that are added to the vocabulary, as rows of zeros")
    add("--type", default="7B", help=f"size of the model, which is checked: {', '.join(SIZES)}, or any other name with")
    add("--num_layers", type=int, help="layers of another size")
    add("--hidden_size", type=int, help="hidden size of another size")
    add("--num_heads", type=int, help="query heads of another size")
    add("--num_kv_heads", type=int, help="key-value heads, which are checked")
    add("--bias", action="store_true", help="the model has biases, which is checked")
    add("--merge-mlp", action="store_true", help="store gate and up-projection as one tensor")
    add("--deepspeed", action="store_true", help="write for DeepSpeed instead of Megatron")
    add("--dialect", choices=("ascendspeed", "modellink"), default="ascendspeed", help="names: of 2023, or of its heir")
    add("--pse", action="store_true", help="refused: models of Baichuan are not supported")
    add("--use_wpack_rotray", action="store_true", help="refused: models of Baichuan are not supported")
    add("--load_weight_map", action="store_true", help="without effect: a single file is always found")
    return result


def model_folder(given: Path) -> Path:
    """The folder itself, or the only model below it: AscendSpeed's README names the folder into which it was cloned."""
    below = [path.parent for path in given.glob("*/config.json")]
    return below[0] if len(below) == 1 and not (given / "config.json").exists() else given


def check(args: argparse.Namespace, arch: Architecture) -> None:
    """Refuse arguments that do not describe the model in the folder.

    Raises:
        CheckpointError: naming all of them.
    """
    if args.pse or args.use_wpack_rotray:
        raise CheckpointError("--pse, --use_wpack_rotray: models of Baichuan are not supported; leave them out")
    layers, hidden, heads = SIZES.get(args.type, (args.num_layers, args.hidden_size, args.num_heads))
    claims = {
        f"--type {args.type} layers": (layers, arch.num_layers),
        f"--type {args.type} hidden size": (hidden, arch.hidden_size),
        f"--type {args.type} query heads": (heads, arch.num_heads),
        "--num_kv_heads": (args.num_kv_heads, arch.num_kv_heads),
    }
    wrong = [f"{claim}: {said}, but {found}" for claim, (said, found) in claims.items() if said not in (None, found)]
    biases = arch.linear_bias or arch.qkv_bias
    if args.bias != biases:
        wrong.append(f"--bias: the model has {'biases: give it' if biases else 'no biases: leave it out'}")
    if wrong:
        raise CheckpointError(f"{args.input_model_dir} holds another model: {'; '.join(wrong)}")


def main() -> None:
    """Convert one model."""
    args = parser().parse_args()
    started = time.monotonic()
    model = open_model(model_folder(args.input_model_dir), "hf", ReadOptions())
    check(args, model.arch)
    if args.added_token_num:
        model = with_vocabulary(model, model.arch.vocab_size + args.added_token_num)
    options = WriteOptions(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        divisible_by=args.make_vocab_size_divisible_by,
        dialect=args.dialect + ("-merged" if args.merge_mlp else ""),
    )
    convert(model, "deepspeed" if args.deepspeed else "megatron", args.output_model_dir, options)
    print(summary(model, args.output_model_dir, time.monotonic() - started))


if __name__ == "__main__":
    run_to_exit(main)
