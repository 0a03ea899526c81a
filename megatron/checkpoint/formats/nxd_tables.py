"""What the tensors of NeuronX Distributed's ranks are called, and how they are cut.

Names are those of Hugging Face's models; linear layers are cut by output rows or input columns, the embedding by rows.
Its LLaMA and Mixtral fuse some of their tensors. Its experts hold all experts of a layer, transposed: gate and
up-projection [E, h, 2f], of which a rank has its columns of each, and down-projection [E, f, h]. Of BLOOM and GPT-2,
for which NxD has no model of its own, the tensors are Hugging Face's as they are (GPT-2's are transposed too).
Legend: E=experts, h=hidden, f=ffn.
"""

from __future__ import annotations

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.formats.model import parameter_shapes
from megatron.checkpoint.formats.nxd_attention import KvLayout, shared_attention
from megatron.checkpoint.formats.nxd_shared import Shared, laid_out, plain, stacked
from megatron.checkpoint.formats.options import Style
from megatron.checkpoint.formats.parts import Split
from megatron.config.architecture import Architecture
from megatron.model.hf import Layout, entries
from megatron.model.hf_config import Family, family_of
from megatron.mpu.sharding import shard_dim

EXPERTS = ".expert_mlps."
"""In the names of tensors whose first axis is experts."""

_OF_NXD: tuple[Family, ...] = ("llama", "mistral", "mixtral")
_AS_THEY_ARE: tuple[Family, ...] = ("bloom", "gpt2")
_ROWS = Split(0)
_TRANSPOSED = Layout(split=lambda x: (x.transpose(1, 2),), join=lambda parts: parts[0].transpose(1, 2))
_TRANSPOSED_HALVES = Layout(
    split=lambda x: x.transpose(1, 2).chunk(2, 1), join=lambda parts: torch.cat(parts, 1).transpose(1, 2)
)


def supported_family(arch: Architecture) -> Family:
    """The family of a model that ranks of NxD can hold.

    Raises:
        CheckpointError: there is no rule for its tensors.
    """
    try:
        family = family_of(arch)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if family in _AS_THEY_ARE or (family in _OF_NXD and not arch.linear_bias):
        return family
    raise CheckpointError(
        f"the models of NeuronX Distributed do not compute this model (family {family}"
        f"{', with biases' if arch.linear_bias else ''})"
    )


def fuses(arch: Architecture) -> bool:
    """Whether NxD has a model for it, whose attention can be stored in several ways."""
    return supported_family(arch) in _OF_NXD


def fused_table(arch: Architecture, style: Style, layout: KvLayout) -> list[Shared]:
    """All tensors of a model that NxD has, in the order of the layers.

    Args:
        arch: of the model.
        style, layout: how attention is stored, see `nxd_attention`.
    """
    table = [plain("model.embed_tokens.weight", "embedding.word.weight", _ROWS)]
    for layer in range(arch.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        table += [
            plain(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", None),
            *shared_attention(f"{theirs}self_attn.", f"{ours}attention.", style, layout, arch),
            plain(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm.weight", None),
            *(_experts if arch.has_experts(layer) else _dense)(f"{theirs}mlp.", f"{ours}mlp."),
        ]
    table.append(plain("model.norm.weight", "final_norm.weight", None))
    if not arch.tied_embeddings:
        table.append(plain("lm_head.weight", "head.weight", _ROWS))
    return table


def _dense(theirs: str, ours: str) -> list[Shared]:
    return [
        stacked(f"{theirs}gate_up_proj.weight", (f"{ours}gate.weight", f"{ours}up.weight")),
        plain(f"{theirs}down_proj.weight", f"{ours}down.weight", Split(1)),
    ]


def _experts(theirs: str, ours: str) -> list[Shared]:
    inner = f"{theirs.removesuffix('.')}{EXPERTS}mlp_op."
    gate_up = (f"{ours}experts.gate.weight", f"{ours}experts.up.weight")
    return [
        plain(f"{theirs}router.linear_router.weight", f"{ours}router.weight", None),
        laid_out(f"{inner}gate_up_proj.weight", gate_up, _TRANSPOSED_HALVES, Split(2, 2)),
        laid_out(f"{inner}down_proj.weight", (f"{ours}experts.down.weight",), _TRANSPOSED, Split(1)),
    ]


def plain_table(arch: Architecture) -> list[Shared]:
    """All tensors of a model that is stored as Hugging Face has it, in the order of the layers."""
    shapes = parameter_shapes(arch)
    of_gpt2 = supported_family(arch) == "gpt2"

    def split(ours: tuple[str, ...]) -> Split | None:
        dim = shard_dim(ours[0])
        if dim is None:
            return None
        transposed = of_gpt2 and ours[0].startswith("layers.") and len(shapes[ours[0]]) == 2
        return Split(1 - dim if transposed else dim, len(ours) if of_gpt2 else 1)

    return [laid_out(entry.theirs, entry.ours, entry.layout, split(entry.ours)) for entry in entries(arch)]
