"""Checkpoints of NeuronX Distributed (NxD).

    checkpoint, done                                            marks of a complete checkpoint
    model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt                   weights of one rank, under Hugging Face's names
    model/....pt.tensors/tensor_N.pt                            with "xser": one file per tensor

or one file `checkpoint.pt` with the whole model as Hugging Face has it ("full state"). Names and cuts are in
`nxd_tables`, how attention is stored is in `nxd_attention`. With expert parallelism (read only) there is a file per
expert-parallel rank too, ep_rank_EE, of which the first has what is no expert.
Stages that cannot have the same number of layers: the last ones have one more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.files import write_synced
from megatron.checkpoint.formats.assets import FOLDER, assets_beside, assets_in
from megatron.checkpoint.formats.huggingface import from_state_dict, to_state_dict
from megatron.checkpoint.formats.lazy import LazyTensors, cast_view, in_memory, meta, record_of, rows_view
from megatron.checkpoint.formats.merge import check_heads
from megatron.checkpoint.formats.model import VOCABULARY, StoredModel, check, parameter_shapes, unpadded
from megatron.checkpoint.formats.nxd_attention import found_attention, layout_for
from megatron.checkpoint.formats.nxd_shared import Shared
from megatron.checkpoint.formats.nxd_tables import EXPERTS, fused_table, fuses, plain_table
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions, described_architecture, new_folder
from megatron.checkpoint.formats.torch_read import Inert, flatten, load_torch
from megatron.checkpoint.formats.torch_write import Slot, TorchFile
from megatron.checkpoint.manifest import TensorRecord
from megatron.config.architecture import Architecture

FULL = "full"
_FULL_FILE = "checkpoint.pt"
_RANK = re.compile(r"(?:dp_rank_00_)?(?:ep_rank_(\d+)_)?tp_rank_(\d+)_pp_rank_(\d+)(?:\.pt)?")
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.")
_AT_THE_START = ("model.embed_tokens.", "transformer.word_embeddings", "transformer.wte.", "transformer.wpe.")
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
    return from_state_dict(stored, arch, file)


def _read_ranks(folder: Path, arch: Architecture, options: ReadOptions) -> LazyTensors:
    ranks = _rank_tensors(folder)
    for rank, tensors in enumerate(ranks):
        if odd := sorted(tensors.records.keys() ^ ranks[0].records.keys()):
            raise CorruptCheckpoint(f"{folder}: tensor-parallel ranks 0 and {rank} differ in {', '.join(odd[:_SHOWN])}")
    table = _found_table(ranks, arch, options)
    expected = {shared.name for shared in table}
    found = {name for name in ranks[0].records if not name.endswith("rotary_emb.inv_freq")}
    if arch.tied_embeddings:
        found.discard("lm_head.weight")
    if odd := sorted(expected ^ found):
        raise CheckpointMismatch(f"{folder}: its tensors do not fit its configuration: {', '.join(odd[:_SHOWN])}")
    return _logical(ranks, table, arch)


def _found_table(ranks: Sequence[LazyTensors], arch: Architecture, options: ReadOptions) -> list[Shared]:
    """All tensors of the model; how attention is stored shows in the first layer."""
    if not fuses(arch):
        return plain_table(arch)
    prefix = "model.layers.0.self_attn."
    stored = {
        name.removeprefix(prefix): [tensors.read(name) for tensors in ranks]
        for name in ranks[0].records
        if name.startswith(prefix)
    }
    return fused_table(arch, *found_attention(stored, arch, query_tiled=options.query_tiled))


def _rank_tensors(folder: Path) -> list[LazyTensors]:
    """All tensors of each tensor-parallel rank.

    Raises:
        CorruptCheckpoint: files are missing.
    """
    inner = folder / "model" if (folder / "model").is_dir() else folder
    files: dict[tuple[int, int, int], Path] = {}
    for path in inner.iterdir():
        if match := _RANK.fullmatch(path.name):
            place = int(match[1] or 0), int(match[2]), int(match[3])
            files[place] = path if path.is_file() else path / _FULL_FILE
    if not files:
        raise CheckpointMismatch(f"{folder} has no files of ranks such as model/dp_rank_00_tp_rank_00_pp_rank_00.pt")
    sizes = [1 + max(place[at] for place in files) for at in range(3)]
    for expert, rank, stage in product(*map(range, sizes)):
        if (expert, rank, stage) not in files:
            of_experts = f"ep_rank_{expert:02d}_" if sizes[0] > 1 else ""
            name = f"{of_experts}tp_rank_{rank:02d}_pp_rank_{stage:02d}"
            raise CorruptCheckpoint(f"{inner}: the file of {name} is missing")
    return [
        _with_all_experts(
            [_stages_tensors([files[e, rank, stage] for stage in range(sizes[2])]) for e in range(sizes[0])]
        )
        for rank in range(sizes[1])
    ]


def _stages_tensors(files: Iterable[Path]) -> LazyTensors:
    return in_memory({name: tensor for file in files for name, tensor in _file_tensors(file).items()})


def _with_all_experts(parts: Sequence[LazyTensors]) -> LazyTensors:
    """The tensors of the first expert-parallel rank, those of experts joined with the others'.

    Raises:
        CorruptCheckpoint: a rank lacks a tensor of experts.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    experts = {name for name in first.records if EXPERTS in name}
    for rank, part in enumerate(parts):
        if absent := sorted(experts - part.records.keys()):
            raise CorruptCheckpoint(f"expert-parallel rank {rank} lacks {', '.join(absent[:_SHOWN])}")
    counts = {name: sum(part.records[name].shape[0] for part in parts) for name in experts}
    records = {
        name: replace(record, shape=(counts[name], *record.shape[1:])) if name in experts else record
        for name, record in first.records.items()
    }

    def read_one(name: str) -> Tensor:
        return torch.cat([part.read(name) for part in parts]) if name in experts else first.read(name)

    return LazyTensors(records, read_one)


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
        CheckpointError: there is no rule for the model, it cannot be divided so, or `folder` is there already.
    """
    arch = unpadded(model.arch)
    weights = cast_view(model.weights, options.dtype)
    with new_folder(folder) as temporary:
        if options.dialect == FULL:
            whole = to_state_dict(weights, arch)
            tree = {name: Slot(name, record) for name, record in whole.records.items()}
            with TorchFile(temporary / _FULL_FILE, tree) as file:
                for name in tree:
                    file.write(name, whole.read(name))
        else:
            _write_ranks(weights, arch, temporary, options)
        if model.assets.files:
            model.assets.copy_to(temporary / FOLDER)


def _table_to_write(arch: Architecture, options: WriteOptions) -> list[Shared]:
    """All tensors of the model.

    Raises:
        CheckpointError: there is no rule for them, or heads cannot be shared out so.
    """
    if not fuses(arch):
        if options.attention is not None:
            raise CheckpointError(
                f"--attention {options.attention}: query, key and value of this model are one tensor, as Hugging Face "
                "has it; leave it out"
            )
        check_heads(arch, options.tp)
        return plain_table(arch)
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
    return fused_table(arch, style, layout)


def _write_ranks(weights: LazyTensors, arch: Architecture, folder: Path, options: WriteOptions) -> None:
    table = _table_to_write(arch, options)
    rows = -(-arch.vocab_size // options.tp) * options.tp
    if rows != arch.vocab_size:
        options.log(
            f"WARNING: the vocabulary of {arch.vocab_size} is padded to {rows} rows: set vocab_size to {rows} in the "
            "config.json of the run, as NeuronX Distributed does not pad"
        )
    padded = rows_view(weights, {name: rows for name in VOCABULARY if name in weights.records})
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
    return layers.start == 0 if name.startswith(_AT_THE_START) else layers.stop == num_layers


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
