r"""The conversion of NeuronX Distributed's LLaMA examples, with their arguments.

    python tools/ckpt_convert/convert_checkpoints.py --convert_from_full_state --hw_backend trn1 --qkv_linear 1 \
        --tp_size 32 --pp_size 4 --kv_size_multiplier 4 --input_dir llama-70b --output_dir pretrained_weight

The full state may also be a Hugging Face folder, with safetensors too. The layout of a sharded checkpoint is found from
its files, whatever is said about it. It is tools/convert_checkpoint.py with --to nxd or --from nxd.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats import ReadOptions, StoredModel, WriteOptions, convert, open_model, summary
from megatron.checkpoint.formats.nxd import FULL
from megatron.checkpoint.formats.options import Style
from megatron.training.failures import run_to_exit

_UNSUPPORTED = {
    "hf_model_name": "nothing is downloaded here: give the folder with --input_dir",
    "convert_to_xser": "one file per tensor is read, but not written",
    "save_xser": "one file per tensor is read, but not written",
    "i_tp_round_factor": "the padding of experts is not supported",
    "pad_attn_heads": "the padding of heads is not supported",
    "nxdt_yaml_config": "give the model's config.json with --config",
}
_ONE = ("ep_size", "virtual_pp_size")


def truth(text: str) -> bool:
    """A yes or no; the original takes any text for yes, even "False"."""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = result.add_argument
    add("--input_dir", type=Path, help="full state (a file, or a Hugging Face folder) or folder of sharded weights")
    add("--output_dir", type=Path, required=True, help="folder to write")
    add("--hw_backend", choices=("trn1", "trn2"), default="trn1", help="decides the order of heads")
    add("--config", type=Path, help="config.json of the model")
    add("--model_key", default="model", help="key of the weights in a file, where they are not on top")
    for name in ("tp_size", "pp_size", "ep_size", "virtual_pp_size", "kv_size_multiplier"):
        add(f"--{name}", type=int, default=1, help="of the sharded checkpoint")
    add("--n_layers", type=int, default=0, help="layers of the model, which are checked")
    for name in ("coalesce_qkv", "qkv_linear", "fuse_qkv"):
        add(f"--{name}", type=truth, nargs="?", const=True, default=False, help="how attention is stored")
    for name in ("load_xser", "save_xser", "pad_attn_heads"):
        add(f"--{name}", type=truth, nargs="?", const=True, default=False, help="see docs/converting.md")
    add("--i_tp_round_factor", type=int, default=0, help="refused")
    add("--hf_model_name", help="refused: nothing is downloaded")
    add("--nxdt_yaml_config", help="refused")
    add("--model_style", choices=("hf", "megatron"), default="hf", help="names of the tensors; only hf")
    what = result.add_mutually_exclusive_group(required=True)
    switch = what.add_argument
    switch("--convert_from_full_state", "--convert_from_full_model", action="store_true", help="full to sharded")
    switch("--convert_to_full_state", "--convert_to_full_model", action="store_true", help="sharded to full")
    switch("--convert_from_xser", action="store_true", help="one file per tensor to one per rank")
    switch("--convert_to_xser", action="store_true", help="refused")
    return result


def check(args: argparse.Namespace) -> None:
    """Refuse what is not supported.

    Raises:
        CheckpointError: naming the flag.
    """
    for name, reason in _UNSUPPORTED.items():
        if getattr(args, name):
            raise CheckpointError(f"--{name}: {reason}")
    for name in _ONE:
        if getattr(args, name) != 1:
            raise CheckpointError(f"--{name} {getattr(args, name)}: only 1 is supported")
    if args.model_style != "hf" or args.model_key != "model":
        raise CheckpointError(f"--model_style {args.model_style} --model_key {args.model_key}: only hf and model")
    if args.input_dir is None:
        raise CheckpointError("--input_dir is missing")


def attention(args: argparse.Namespace) -> Style:
    """How attention is to be stored."""
    if args.qkv_linear:
        return "fused" if args.fuse_qkv else "grouped"
    return "coalesced" if args.coalesce_qkv else "separate"


def read(args: argparse.Namespace) -> StoredModel:
    """Open the source.

    Raises:
        CheckpointError: it cannot be read, or has another number of layers.
    """
    options = ReadOptions(config=args.config, query_tiled=args.hw_backend == "trn1")
    hugging_face = args.input_dir.is_dir() and (args.input_dir / "config.json").is_file()
    model = open_model(args.input_dir, "hf" if args.convert_from_full_state and hugging_face else "nxd", options)
    if args.n_layers not in (0, model.arch.num_layers):
        raise CheckpointError(f"--n_layers {args.n_layers}: the model has {model.arch.num_layers}")
    return model


def main() -> None:
    """Convert one checkpoint."""
    args = parser().parse_args()
    started = time.monotonic()
    check(args)
    model = read(args)
    options = WriteOptions(
        tp=args.tp_size,
        pp=args.pp_size,
        kv_size_multiplier=args.kv_size_multiplier,
        attention=attention(args),
        kv_tiled=args.hw_backend == "trn1",
    )
    convert(model, "nxd", args.output_dir, WriteOptions(dialect=FULL) if args.convert_to_full_state else options)
    print(summary(model, args.output_dir, time.monotonic() - started))


if __name__ == "__main__":
    run_to_exit(main)
