"""Takes models of Hugging Face through every format, in every layout, and back.

    python -m tests.checkpoint.matrix --write docs/converting.md

The models are small and random, written by transformers. After each conversion the logits of this project's model are
compared with theirs; what comes back must be the same files of tensors, to the bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats import FORMATS, ReadOptions, StoredModel, WriteOptions, convert, open_model
from megatron.model.gpt import GPT, ModelInputs
from megatron.mpu.groups import single_process
from megatron.ops import reference_ops
from tests.model.helpers import relative_error, tokens_of
from tests.model.test_hf import LOGITS_TOLERANCE, _random_model
from tests.parity import write_section

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 83,
    "max_position_embeddings": 64,
}
_ENDS = ("bos_token_id", "eos_token_id")
_BLOOM = {"hidden_size": 64, "n_layer": 4, "n_head": 8, "vocab_size": 83}
_GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 64, "vocab_size": 83} | dict.fromkeys(_ENDS, 1)

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "LLaMA 3.1 (grouped queries)": ("Llama", {**_LLAMA, "rope_theta": 500.0}),
    "LLaMA 33B (8 of 8 heads)": ("Llama", {**_LLAMA, "num_key_value_heads": 8}),
    "Mistral (window)": ("Mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 6}),
    "Mixtral (4 experts)": ("Mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "BLOOM": ("Bloom", _BLOOM),
    "GPT-2": ("GPT2", _GPT2),
}
"""Family -> class of transformers, its configuration."""

OLD_FILES = ("BLOOM",)
"""Families that are read from `.bin` files, as they were published; the others are safetensors in shards."""

TENSOR, PIPELINE = (1, 2, 4, 8), (1, 2, 4)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


@dataclass(frozen=True)
class Target:
    """One format to go through, written with these options."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def layouts(self) -> list[tuple[int, int]]:
        """Numbers of tensor-parallel ranks and stages that it is written for."""
        if not FORMATS[self.kind].sharded or self.options.get("dialect") == "full":
            return [(1, 1)]
        return [(tp, pp) for pp in PIPELINE for tp in TENSOR]


TARGETS: Mapping[str, Target] = {
    "native": Target("native"),
    "megatron": Target("megatron"),
    "megatron, AscendSpeed's names": Target("megatron", {"dialect": "ascendspeed"}),
    "megatron, ModelLink's names": Target("megatron", {"dialect": "legacy"}),
    "deepspeed": Target("deepspeed"),
    "universal": Target("universal"),
    "torch_dist": Target("torch_dist"),
    "nxd": Target("nxd"),
    "nxd, full": Target("nxd", {"dialect": "full"}),
}


@dataclass(frozen=True)
class Source:
    """A model of transformers and where it was written."""

    model: Any
    folder: Path


def write_source(family: str, folder: Path) -> Source:
    """Let transformers write a random model."""
    model = _random_model(*FAMILIES[family]).eval()
    model.save_pretrained(folder, max_shard_size="10MB" if family in OLD_FILES else "50KB")
    if family in OLD_FILES:
        (folder / "model.safetensors").unlink()
        torch.save(model.transformer.state_dict(), folder / "pytorch_model.bin")
    return Source(model, folder)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors in the files of a Hugging Face folder, read by its own libraries."""
    found: dict[str, Tensor] = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif file.suffix == ".bin":
            found |= {f"transformer.{name}": tensor for name, tensor in torch.load(file).items()}
    return found


def logits_error(stored: StoredModel, source: Source) -> float:
    """Largest difference of the logits from those of transformers, relative to the largest."""
    ours = GPT(stored.arch, ops=reference_ops(), groups=single_process()).eval()
    ours.load_state_dict({name: stored.weights.read(name) for name in stored.weights.records})
    tokens, _ = tokens_of(stored.arch, length=24)
    with torch.no_grad():
        found = ours(tokens, ModelInputs())[..., : stored.arch.vocab_size].transpose(0, 1)
        return relative_error(found, source.model(input_ids=tokens).logits)


def through(source: Source, target: Target, layout: tuple[int, int], folder: Path) -> float:
    """Convert there and back.

    Args:
        source: the model.
        target: the format.
        layout: tensor-parallel ranks and stages.
        folder: an empty one to work in.

    Returns:
        See `logits_error`.

    Raises:
        CheckpointError: the format cannot hold the model.
        AssertionError: something is not the same.
    """
    tp, pp = layout
    options = WriteOptions(tp=tp, pp=pp, divisible_by=8, log=lambda _: None, **target.options)
    convert(open_model(source.folder, "hf", ReadOptions()), target.kind, folder / "there", options)
    stored = open_model(folder / "there", target.kind, ReadOptions())
    error = logits_error(stored, source)
    assert error <= LOGITS_TOLERANCE, f"logits differ by {error}"
    convert(stored, "hf", folder / "back", WriteOptions(max_shard_bytes=50_000))
    expected, found = tensors_in(source.folder), tensors_in(folder / "back")
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not different, different
    configs = [(path / "config.json").read_text() for path in (source.folder, folder / "back")]
    assert configs[0] == configs[1], "the configurations differ"
    return error


def cell(source: Source, target: Target) -> str:
    """One format in all its layouts: how many were the same and the largest error of logits, or why it cannot be."""
    errors = []
    refusals: list[str] = []
    for layout in target.layouts():
        with tempfile.TemporaryDirectory() as folder:
            try:
                errors.append(through(source, target, layout, Path(folder)))
            except CheckpointError as refusal:
                refusals.append(str(refusal))
    if not errors:
        return "no place for it"
    layouts = len(errors) + len(refusals)
    return f"{len(errors)} of {layouts}, {max(errors):.0e}"


def matrix(families: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Rows of a Markdown table."""
    rows = ["| | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            source = write_source(family, Path(folder) / "hf")
            cells = [cell(source, TARGETS[name]) for name in targets]
        rows.append(f"| {family} | " + " | ".join(cells) + " |")
        sys.stderr.write(rows[-1] + "\n")
    return rows


HEADING = f"""## There and back

Written by `python -m tests.checkpoint.matrix --write docs/converting.md`. Small random models that transformers wrote
(BLOOM as `.bin`, the others as shards of safetensors; 4 layers, 8 heads, a vocabulary of 83) go from Hugging Face to
each format and back. Formats that are split are written for tensor-parallel sizes {_listed(TENSOR)}, each with
{_listed(PIPELINE)} stages. "12 of 12": in so many layouts every tensor and the configuration came back as they were, to
the bit. With it stands the largest error of the logits of this project's model, loaded from the format, against those
of transformers (float32, relative; at most {LOGITS_TOLERANCE:.0e} is allowed).
"""


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="Markdown file")
    rows = matrix(list(FAMILIES), list(TARGETS))
    write_section(parser.parse_args().write, HEADING, rows)


if __name__ == "__main__":
    main()
