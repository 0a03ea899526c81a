"""Checkpoints of Megatron's "torch" format: one file per model-parallel rank, see `megatron_ranks`.

    latest_checkpointed_iteration.txt             "100" or "release"
    iter_0000100/mp_rank_TT.../                   files of one rank

Weights, arguments and counters are converted, and the optimizer's state is read, see `megatron_optimizer`; none is
written, as it is tied to the layout of a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.files import write_synced
from megatron.checkpoint.folder import TRACKER
from megatron.checkpoint.formats.assets import FOLDER, assets_beside
from megatron.checkpoint.formats.lazy import in_memory
from megatron.checkpoint.formats.megatron_optimizer import read_optimizer
from megatron.checkpoint.formats.megatron_ranks import FILES, RANK_FOLDER, tensor_ranks
from megatron.checkpoint.formats.merge import Megatron, logical_weights, nest, to_dialect
from megatron.checkpoint.formats.model import StoredModel, check
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions, described_architecture, new_folder
from megatron.checkpoint.formats.parts import even_stages, part_record, write_parts
from megatron.checkpoint.formats.settings import complete_record
from megatron.checkpoint.formats.torch_write import Slot, TorchFile
from megatron.checkpoint.formats.zero import WEIGHTS

_VERSION = 3.0
_OF_2022 = "optim.pt"
_COPY_OF_EMBEDDING = "word_embeddings_for_head.weight"


def read(folder: Path, options: ReadOptions) -> StoredModel:
    """Open a checkpoint: the folder of a run, or one checkpoint in it.

    With `options.optimizer` and an optimizer's state the weights are its float32 ones, else those of the model.

    Raises:
        CorruptCheckpoint: files are missing or damaged.
        CheckpointError: it does not fit its configuration, or does not describe the model.
    """
    path = _checkpoint_in(folder, options.iteration)
    if options.optimizer and any(path.glob(f"mp_rank_*/{_OF_2022}")):
        raise CheckpointError(
            f"{path}: its optimizer's state ({_OF_2022}, as Megatron-LM wrote it in 2022) is in pieces that do not "
            "show which parameter they belong to: convert the weights alone with --no-optimizer"
        )
    ranks = tensor_ranks(path)
    first = ranks[0].files[0].state
    optimizer, steps = read_optimizer(ranks) if options.optimizer else ({}, None)
    record = record_in(first)
    assets = assets_beside(path.parent, record)
    arch = described_architecture(options, assets, record, path)
    version = float(first.get("checkpoint_version") or 0)
    weights = optimizer.pop(WEIGHTS, None) or [in_memory(rank.model()) for rank in ranks]
    model = StoredModel(
        arch=arch,
        weights=logical_weights(weights, arch, options, path, version=version),
        moments={
            entry: logical_weights(parts, arch, options, path, version=version) for entry, parts in optimizer.items()
        },
        steps=steps,
        assets=assets,
        settings=record,
        progress=progress_in(first, record),
    )
    return check(model, path)


def _checkpoint_in(folder: Path, iteration: int | None) -> Path:
    """The folder with the ranks' folders."""
    if any(RANK_FOLDER.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    name = tracked(folder, TRACKER) if iteration is None else str(iteration)
    path = folder / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    if not path.is_dir():
        raise CorruptCheckpoint(
            f"{folder} has no {path.name}, which {TRACKER if iteration is None else '--ckpt-step'} names"
        )
    return path


def tracked(folder: Path, tracker: str) -> str:
    """What the file that names the latest checkpoint says.

    Raises:
        CheckpointMismatch: there is no such file.
    """
    try:
        return (folder / tracker).read_text().strip()
    except OSError as error:
        raise CheckpointMismatch(f"{folder} has no {tracker}; give the folder of one checkpoint in it") from error


def record_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in a file, as a dictionary."""
    args = state.get("args")
    record = dict(vars(args)) if args is not None else {}
    info = state.get("universal_checkpoint_info") or {}
    if isinstance(info, Mapping) and "original_vocab_size" in info:
        record.setdefault("original_vocab_size", info["original_vocab_size"])
    return record


def progress_in(state: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """How far training was."""
    names = ("consumed_train_samples", "consumed_valid_samples", "consumed_train_tokens")
    progress = {name: record[name] for name in names if isinstance(record.get(name), int)}
    progress["iteration"] = state.get("iteration") or 0
    schedule = state.get("opt_param_scheduler") or state.get("lr_scheduler")
    if isinstance(schedule, Mapping) and "num_steps" in schedule:
        progress["opt_param_scheduler"] = {k: v for k, v in schedule.items() if isinstance(v, (int, float, str))}
    return progress


def write(model: StoredModel, folder: Path, options: WriteOptions) -> None:
    """Write a checkpoint for `options.tp` ranks and `options.pp` stages; a model without iterations is a "release".

    Raises:
        CheckpointError: the model cannot be divided so, or `folder` is there already.
    """
    dialect = options.dialect or ("core" if model.arch.experts else "megatron")
    whole = to_dialect(model, dialect, options)
    if model.arch.num_kv_heads % options.tp and not dialect.startswith("core"):
        options.log(
            f"WARNING: {model.arch.num_kv_heads} key-value heads are cut over {options.tp} tensor-parallel "
            "ranks, which of Megatron's programs Megatron-Core alone can load"
        )
    name = f"iter_{model.iteration:07d}" if model.iteration else "release"
    state = client_state(model, whole, options)
    with new_folder(folder) as temporary:
        for stage, layers in enumerate(even_stages(model.arch.num_layers, options.pp)):
            paths = [temporary / name / _rank_folder(rank, stage, options) / FILES[0] for rank in range(options.tp)]
            for path in paths:
                path.parent.mkdir(parents=True)
            slots = stage_slots(whole, layers, copy_embedding=options.pp > 1)
            write_stage(paths, whole, slots, lambda tree: {**state, "model": tree})
        if model.assets.files:
            model.assets.copy_to(temporary / FOLDER)
        write_synced(temporary / TRACKER, (str(model.iteration) if model.iteration else "release").encode())


def _rank_folder(rank: int, stage: int, options: WriteOptions) -> str:
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if options.pp > 1 else "")


def write_stage(
    paths: Sequence[Path],
    whole: Megatron,
    slots: Mapping[str, str],
    objects: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Write one file per tensor-parallel rank with the same tensors in each.

    Args:
        paths: the files.
        whole: the model.
        slots: name in the file -> full name.
        objects: from the dictionary of the tensors to what the file holds.

    Raises:
        CheckpointError: a tensor cannot be divided over the ranks.
    """
    splits = whole.splits()
    tree = {
        slot: Slot(slot, part_record(whole.tensors.records[name], splits[name], len(paths), name))
        for slot, name in slots.items()
    }
    with ExitStack() as stack:
        files = [stack.enter_context(TorchFile(path, objects(nest(tree, whole.dialect)))) for path in paths]
        write_parts(files, whole.tensors, splits, slots)


def stage_slots(whole: Megatron, layers: range, *, copy_embedding: bool) -> dict[str, str]:
    """The tensors of one pipeline stage: name in its file, with layers numbered from 0 -> full name.

    Args:
        whole: the model.
        layers: of the stage.
        copy_embedding: the last stage has a copy of the embedding, if it is the head too.
    """
    first, last = layers.start == 0, layers.stop == whole.num_layers
    slots: dict[str, str] = {}
    for piece in whole.table:
        full = piece.full_name(whole.dialect)
        if isinstance(piece.place, int):
            if piece.place in layers:
                slots[piece.full_name(whole.dialect, piece.place - layers.start)] = full
        elif first if piece.place == "first" else last:
            slots[full] = full
    tied = all("head.weight" not in piece.ours for piece in whole.table)
    if copy_embedding and last and tied:
        head = whole.dialect.ends["head"].format("weight") if not whole.dialect.nested else _COPY_OF_EMBEDDING
        slots[head] = whole.dialect.ends["embedding.word"].format("weight")
    return slots


def client_state(model: StoredModel, whole: Megatron, options: WriteOptions) -> dict[str, Any]:
    """What Megatron keeps beside the tensors: arguments, counters, schedule."""
    record = complete_record(model.arch, model.settings, {}, tp=options.tp, pp=options.pp)
    dtype = model.weights.records["embedding.word.weight"].dtype if options.dtype is None else options.dtype
    args = {
        **record,
        **{name: value for name, value in model.progress.items() if isinstance(value, int)},
        "padded_vocab_size": whole.padded_vocab_size,
        "original_vocab_size": model.arch.vocab_size,
        "make_vocab_size_divisible_by": options.divisible_by,
        "params_dtype": getattr(torch, str(dtype).removeprefix("torch.")),
    }
    state = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": _VERSION,
        "iteration": model.iteration,
        "tokens": model.progress.get("consumed_train_tokens", 0),
    }
    schedule = model.progress.get("opt_param_scheduler")
    return state if schedule is None else {**state, "opt_param_scheduler": schedule}
