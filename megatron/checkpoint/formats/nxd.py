"""Checkpoints of NeuronX Distributed (NxD), for its LLaMA models.

    checkpoint, done                                            marks of a complete checkpoint
    model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt                   weights of one rank, under Hugging Face's names
    model/....pt.tensors/tensor_N.pt                            with "xser": one file per tensor

or one file `checkpoint.pt` with the whole model ("full state"). How attention is stored is in `nxd_attention`.
Stages that cannot have the same number of layers: the last ones have one more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.files import write_synced
from megatron.checkpoint.formats.assets import FOLDER, assets_beside, assets_in
from megatron.checkpoint.formats.lazy import (
    LazyTensors,
    cast_view,
    in_memory,
    join_view,
    meta,
    record_of,
    rows_view,
    split_view,
)
from megatron.checkpoint.formats.merge import check_heads
from megatron.checkpoint.formats.model import VOCABULARY, StoredModel, check, parameter_shapes, unpadded
from megatron.checkpoint.formats.nxd_attention import (
    KvLayout,
    Shared,
    found_attention,
    layout_for,
    plain,
    shared_attention,
    stacked,
)
from megatron.checkpoint.formats.options import ReadOptions, Style, WriteOptions, described_architecture, new_folder
from megatron.checkpoint.formats.parts import Split
from megatron.checkpoint.formats.torch_read import Inert, flatten, load_torch
from megatron.checkpoint.formats.torch_write import Slot, TorchFile
from megatron.checkpoint.manifest import TensorRecord
from megatron.config.architecture import Architecture
from megatron.model.hf import entries, stored_names
from megatron.model.hf_config import family_of

FULL = "full"
_FULL_FILE = "checkpoint.pt"
_RANK = re.compile(r"(?:dp_rank_00_)?(?:ep_rank_00_)?tp_rank_(\d+)_pp_rank_(\d+)(?:\.pt)?")
_FAMILIES = ("llama", "mistral")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SHOWN = 5


def read(folder: Path, options: ReadOptions) -> StoredModel:
    """Open a checkpoint: the folder of one tag, its folder `model`, or a file with the full state.

    Raises:
        CorruptCheckpoint: files are missing or damaged.
        CheckpointError: it does not fit its configuration, or does not describe the model.
    """
    root = folder.parent if folder.is_file() or folder.name == "model" else folder
    full = folder if folder.is_file() else folder / _FULL_FILE
    assets = assets_in(root) if (root / "config.json").is_file() else assets_beside(root, {})
    arch = described_architecture(options, assets, {}, folder)
    weights = _read_full(full, arch) if full.is_file() else _read_ranks(folder, arch, options)
    return check(StoredModel(arch=arch, weights=weights, assets=assets), folder)


def _read_full(file: Path, arch: Architecture) -> LazyTensors:
    state = load_torch(file)
    stored = in_memory(flatten(state.get("model", state) if isinstance(state, Mapping) else state))
    try:
        names = stored_names(stored.records, arch)
    except ValueError as error:
        raise CheckpointMismatch(f"{file}: {error}") from error
    whole = LazyTensors(
        {name: stored.records[there] for name, there in names.items()}, lambda name: stored.read(names[name])
    )
    return split_view(whole, entries(arch))


def _read_ranks(folder: Path, arch: Architecture, options: ReadOptions) -> LazyTensors:
    ranks = [in_memory(tensors) for tensors in _rank_tensors(folder)]
    for rank, tensors in enumerate(ranks):
        if odd := sorted(tensors.records.keys() ^ ranks[0].records.keys()):
            raise CorruptCheckpoint(f"{folder}: tensor-parallel ranks 0 and {rank} differ in {', '.join(odd[:_SHOWN])}")
    prefix = "model.layers.0.self_attn."
    stored = {
        name.removeprefix(prefix): [tensors.read(name) for tensors in ranks]
        for name in ranks[0].records
        if name.startswith(prefix)
    }
    style, layout = found_attention(stored, arch, query_tiled=options.query_tiled)
    table = _table(arch, style, layout)
    expected = {shared.name for shared in table}
    found = {name for name in ranks[0].records if not name.endswith("rotary_emb.inv_freq")}
    if arch.tied_embeddings:
        found.discard("lm_head.weight")
    if odd := sorted(expected ^ found):
        raise CheckpointMismatch(f"{folder}: its tensors do not fit its configuration: {', '.join(odd[:_SHOWN])}")
    return _logical(ranks, table, arch)


def _rank_tensors(folder: Path) -> list[dict[str, Tensor]]:
    """All tensors of each tensor-parallel rank.

    Raises:
        CorruptCheckpoint: files are missing.
    """
    inner = folder / "model" if (folder / "model").is_dir() else folder
    files: dict[tuple[int, int], Path] = {}
    for path in inner.iterdir():
        if match := _RANK.fullmatch(path.name):
            files[int(match[1]), int(match[2])] = path if path.is_file() else path / _FULL_FILE
    ranks, stages = (1 + max((key[at] for key in files), default=-1) for at in range(2))
    for rank in range(ranks):
        for stage in range(stages):
            if (rank, stage) not in files:
                raise CorruptCheckpoint(f"{inner}: the file of tp_rank_{rank:02d}_pp_rank_{stage:02d} is missing")
    if not files:
        raise CheckpointMismatch(f"{folder} has no files of ranks such as model/dp_rank_00_tp_rank_00_pp_rank_00.pt")
    return [
        {name: tensor for stage in range(stages) for name, tensor in _file_tensors(files[rank, stage]).items()}
        for rank in range(ranks)
    ]


def _file_tensors(path: Path) -> dict[str, Tensor]:
    state = load_torch(path)
    state = state.get("model", state)
    separate = path.with_name(f"{path.name}.tensors")
    if separate.is_dir():
        state = {name: _referenced(value, separate) for name, value in state.items()}
    return flatten(state)


def _referenced(value: Any, folder: Path) -> Any:
    """The tensor that a reference stands for ("xser")."""
    number = getattr(value, "tid", None) if isinstance(value, Inert) else None
    return value if number is None else load_torch(folder / f"tensor_{number}.pt")


def _table(arch: Architecture, style: Style, layout: KvLayout) -> list[Shared]:
    """All tensors of the model, in the order of the layers."""
    rows = Split(0)
    table = [plain("model.embed_tokens.weight", "embedding.word.weight", rows)]
    for layer in range(arch.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        table += [
            plain(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", None),
            *shared_attention(f"{theirs}self_attn.", f"{ours}attention.", style, layout, arch),
            plain(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm.weight", None),
            stacked(f"{theirs}mlp.gate_up_proj.weight", (f"{ours}mlp.gate.weight", f"{ours}mlp.up.weight")),
            plain(f"{theirs}mlp.down_proj.weight", f"{ours}mlp.down.weight", Split(1)),
        ]
    table.append(plain("model.norm.weight", "final_norm.weight", None))
    if not arch.tied_embeddings:
        table.append(plain("lm_head.weight", "head.weight", rows))
    return table


def _logical(ranks: Sequence[LazyTensors], table: Sequence[Shared], arch: Architecture) -> LazyTensors:
    places = {name: (shared, index) for shared in table for index, name in enumerate(shared.ours)}
    records = {
        name: TensorRecord(shape, ranks[0].records[places[name][0].name].dtype)
        for name, shape in parameter_shapes(unpadded(arch)).items()
    }
    latest: dict[str, tuple[Tensor, ...]] = {}

    def read_one(name: str) -> Tensor:
        shared, index = places[name]
        if shared.name not in latest:
            latest.clear()  # so that two tensors are never in memory
            latest[shared.name] = shared.join([tensors.read(shared.name) for tensors in ranks])
        tensor = latest[shared.name][index]
        tensor = tensor[: arch.vocab_size] if name in VOCABULARY else tensor
        if tensor.shape != records[name].shape:
            raise CheckpointMismatch(f"{name} is {list(tensor.shape)} instead of {list(records[name].shape)}")
        return tensor

    return LazyTensors(records, read_one)


def write(model: StoredModel, folder: Path, options: WriteOptions) -> None:
    """Write the weights of `options.tp` times `options.pp` ranks; with the dialect "full" one file with all of them.

    Raises:
        CheckpointError: the model is no LLaMA, cannot be divided so, or `folder` is there already.
    """
    arch = unpadded(model.arch)
    _check_family(arch)
    weights = cast_view(model.weights, options.dtype)
    with new_folder(folder) as temporary:
        if options.dialect == FULL:
            whole = join_view(weights, entries(arch))
            tree = {name: Slot(name, record) for name, record in whole.records.items()}
            with TorchFile(temporary / _FULL_FILE, tree) as file:
                for name in tree:
                    file.write(name, whole.read(name))
        else:
            _write_ranks(weights, arch, temporary, options)
        if model.assets.files:
            model.assets.copy_to(temporary / FOLDER)


def _check_family(arch: Architecture) -> None:
    try:
        family = family_of(arch)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if family not in _FAMILIES or arch.linear_bias:
        raise CheckpointError(
            f"the LLaMA models of NeuronX Distributed do not compute this model (family {family}"
            f"{', with biases' if arch.linear_bias else ''})"
        )


def _write_ranks(weights: LazyTensors, arch: Architecture, folder: Path, options: WriteOptions) -> None:
    check_heads(arch, options.tp)
    plain_heads = arch.num_heads == arch.num_kv_heads
    style = options.attention or ("coalesced" if plain_heads else "grouped")
    if style in ("coalesced", "separate") and arch.num_kv_heads % options.tp:
        raise CheckpointError(
            f"{arch.num_kv_heads} key-value heads cannot be cut over {options.tp} ranks; attention must be stored as "
            "grouped or fused, which copies them"
        )
    if style == "coalesced" and not plain_heads:
        raise CheckpointError(
            "query, key and value have different sizes here, so they cannot be coalesced in one tensor"
        )
    layout = layout_for(arch, options.tp, options.kv_size_multiplier, tiled=options.kv_tiled)
    rows = -(-arch.vocab_size // options.tp) * options.tp
    if rows != arch.vocab_size:
        options.log(
            f"WARNING: the vocabulary of {arch.vocab_size} is padded to {rows} rows: set vocab_size to {rows} in the "
            "config.json of the run, as NeuronX Distributed does not pad"
        )
    padded = rows_view(weights, {name: rows for name in VOCABULARY if name in weights.records})
    table = _table(arch, style, layout)
    (folder / "model").mkdir()
    write_synced(folder / "checkpoint", b"1")
    for stage, layers in enumerate(_stages(arch.num_layers, options.pp)):
        own = [shared for shared in table if _stage_has(shared.name, layers, arch.num_layers)]
        paths = [
            folder / "model" / f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_{stage:02d}.pt" for rank in range(options.tp)
        ]
        _write_stage(paths, padded, own)
    write_synced(folder / "done", b"1")


def _stages(num_layers: int, stages: int) -> list[range]:
    each, rest = divmod(num_layers, stages)
    if not each:
        raise CheckpointError(f"{num_layers} layers are too few for {stages} stages (--target-pipeline-parallel-size)")
    starts = [stage * each + max(0, stage - (stages - rest)) for stage in range(stages + 1)]
    return [range(*pair) for pair in pairwise(starts)]


def _stage_has(name: str, layers: range, num_layers: int) -> bool:
    match = _LAYER.match(name)
    if match:
        return int(match[1]) in layers
    return layers.start == 0 if name == "model.embed_tokens.weight" else layers.stop == num_layers


def _write_stage(paths: Sequence[Path], weights: LazyTensors, table: Sequence[Shared]) -> None:
    """One file per tensor-parallel rank; each tensor is read once."""
    shapes = {
        shared.name: record_of(shared.cut(tuple(meta(weights.records[name]) for name in shared.ours), len(paths))[0])
        for shared in table
    }
    tree = {name: Slot(name, record) for name, record in shapes.items()}
    with ExitStack() as stack:
        files = [stack.enter_context(TorchFile(path, tree)) for path in paths]
        for shared in table:
            shares = shared.cut(tuple(weights.read(name) for name in shared.ours), len(paths))
            for file, share in zip(files, shares, strict=True):
                file.write(shared.name, share)
