"""Between the tensors of Megatron's tensor-parallel ranks and logical tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from megatron.checkpoint.formats.lazy import (
    LazyTensors,
    cast_view,
    join_view,
    rows_view,
    split_view,
    stack_view,
    unstack_view,
)
from megatron.checkpoint.formats.model import StoredModel, unpadded
from megatron.checkpoint.formats.names import THIRDS, Dialect, Piece, dialects, frequency_pieces, per_head_last, pieces
from megatron.checkpoint.formats.options import ReadOptions, WriteOptions
from megatron.checkpoint.formats.parts import Split, joined
from megatron.checkpoint.manifest import TensorRecord
from megatron.config.architecture import Architecture

# No parameters: rotary frequencies, state of Transformer Engine, causal masks.
_BUFFER = re.compile(r".*rotary_emb\.inv_freq|.*_extra_state|.*\.attention\.bias")
_COPY_OF_EMBEDDING = re.compile(r"word_embeddings_for_head\..*")
_SHOWN = 5


def logical_weights(
    ranks: Sequence[LazyTensors], arch: Architecture, options: ReadOptions, where: Path, *, version: float = 3.0
) -> LazyTensors:
    """Logical tensors, out of those of all tensor-parallel ranks.

    Args:
        ranks: of each rank all tensors of the model under full names with global layer numbers.
        arch: of the model.
        options: see `average_replicas`.
        where: the checkpoint, for messages.
        version: of Megatron's format, unless `options` says it; below 2 queries, keys and values are laid out
            differently.

    Raises:
        CheckpointMismatch: the names are of no dialect, or do not fit the architecture.
        CorruptCheckpoint: ranks hold different tensors.
    """
    for rank, tensors in enumerate(ranks):
        if odd := sorted(tensors.records.keys() ^ ranks[0].records.keys()):
            raise CorruptCheckpoint(f"{where}: tensor-parallel ranks 0 and {rank} differ in {', '.join(odd[:_SHOWN])}")
    names = {name for name in ranks[0].records if not is_buffer(name) and not _COPY_OF_EMBEDDING.fullmatch(name)}
    dialect, table = _dialect_of(names, arch, where)
    known = version if options.version is None else options.version
    table = [_older(piece, arch, known) for piece in table]
    whole = _joined_view(ranks, table, dialect, average=options.average_replicas)
    rows = {piece.full_name(dialect): arch.vocab_size for piece in table if piece.has_vocabulary_rows}
    single = split_view(rows_view(whole, rows), [piece.entry(dialect) for piece in table])
    return stack_view(single, dialect.stacks(arch))


def is_buffer(name: str) -> bool:
    """Whether a tensor of a module is no parameter of it."""
    return _BUFFER.fullmatch(name) is not None


def _dialect_of(names: Collection[str], arch: Architecture, where: Path) -> tuple[Dialect, list[Piece]]:
    """The dialect with these names, and all tensors of the model in it."""
    best: tuple[int, list[str], list[str]] | None = None
    for dialect in dialects(arch).values():
        try:
            table = pieces(arch, dialect)
        except CheckpointError:
            continue
        expected = {piece.full_name(dialect) for piece in table}
        copies = {dialect.ends["head"].format("weight")} if arch.tied_embeddings else set()
        missing, unknown = sorted(expected - set(names)), sorted(set(names) - expected - copies)
        if not missing and not unknown:
            return dialect, table
        if best is None or len(missing) + len(unknown) < best[0]:
            best = len(missing) + len(unknown), missing, unknown
    if best is None:
        raise CheckpointMismatch(f"{where}: no program with this format computes such a model")
    raise CheckpointMismatch(
        f"{where}: its tensors do not fit its configuration: missing {best[1][:_SHOWN]}, unknown {best[2][:_SHOWN]}"
    )


def _older(piece: Piece, arch: Architecture, version: float) -> Piece:
    """The piece as it was in earlier versions of the format."""
    if version >= 2 or len(piece.ours) != 3:
        return piece
    if arch.num_kv_heads != arch.num_heads:
        raise CheckpointMismatch(f"version {version} of the format knows no grouped-query attention")
    if version == 0:
        return replace(piece, layout=THIRDS, split=Split(0, 3))
    return replace(piece, layout=per_head_last(arch.num_heads))


def _joined_view(
    ranks: Sequence[LazyTensors], table: Sequence[Piece], dialect: Dialect, *, average: bool
) -> LazyTensors:
    splits = {piece.full_name(dialect): piece.split for piece in table}

    def read(name: str) -> Tensor:
        return joined([tensors.read(name) for tensors in ranks], splits[name], name, average=average)

    records = {name: _whole(ranks[0].records[name], split, len(ranks)) for name, split in splits.items()}
    return LazyTensors(records, read)


def _whole(record: TensorRecord, split: Split | None, ranks: int) -> TensorRecord:
    if split is None:
        return record
    shape = list(record.shape)
    shape[split.dim] *= ranks
    return replace(record, shape=tuple(shape))


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """A model in a dialect, ready to be cut for tensor-parallel ranks.

    Attributes:
        dialect: the names.
        table: all tensors.
        tensors: whole, by full names with global layer numbers; the vocabulary is padded with rows of zeros.
        padded_vocab_size: its rows then.
    """

    dialect: Dialect
    table: Sequence[Piece]
    tensors: LazyTensors
    padded_vocab_size: int

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return 1 + max(piece.place for piece in self.table if isinstance(piece.place, int))

    def splits(self) -> dict[str, Split | None]:
        """How each tensor is cut, by full name."""
        return {piece.full_name(self.dialect): piece.split for piece in self.table}


def to_dialect(model: StoredModel, name: str, options: WriteOptions, weights: LazyTensors | None = None) -> Megatron:
    """A model in Megatron's layout.

    Args:
        model: the model.
        name: of the dialect.
        options: `tp`, `divisible_by` and `dtype` count.
        weights: tensors under the names of the weights to take instead of them, such as moments; their dtype is kept.

    Raises:
        CheckpointError: the dialect is unknown, has no place for a tensor, or heads cannot be divided.
    """
    arch = unpadded(model.arch)
    known = dialects(arch)
    if name not in known:
        raise CheckpointError(f"--dialect {name}: there are {', '.join(known)}")
    check_heads(arch, options.tp)
    dialect = known[name]
    table = [*pieces(arch, dialect), *frequency_pieces(arch, dialect)]
    ours = cast_view(model.weights, options.dtype) if weights is None else weights
    rows = options.padded(arch.vocab_size)
    whole = join_view(unstack_view(ours, dialect.stacks(arch)), [piece.entry(dialect) for piece in table])
    padding = {piece.full_name(dialect): rows for piece in table if piece.has_vocabulary_rows}
    return Megatron(dialect=dialect, table=table, tensors=rows_view(whole, padding), padded_vocab_size=rows)


def check_heads(arch: Architecture, tp: int) -> None:
    """Refuse numbers of tensor-parallel ranks that no program can work with.

    Raises:
        CheckpointError: heads, or the width of the feed-forward block, cannot be divided over the ranks.
    """
    for what, number in (("query heads", arch.num_heads), ("elements of the feed-forward block", arch.ffn_hidden_size)):
        if number % tp:
            raise CheckpointError(f"{number} {what} cannot be divided over {tp} ranks (--target-tensor-parallel-size)")
    if arch.num_kv_heads % tp and tp % arch.num_kv_heads:
        raise CheckpointError(
            f"{arch.num_kv_heads} key-value heads and {tp} ranks (--target-tensor-parallel-size): one must divide the "
            "other"
        )


def nest(flat: Mapping[str, object], dialect: Dialect) -> dict[str, object]:
    """The dictionaries in dictionaries that the programs of a dialect write.

    Args:
        flat: by full name.
        dialect: says which beginnings of the names are dictionaries of their own.
    """
    tree: dict[str, object] = {}
    for name, value in flat.items():
        prefix = next((start for start in dialect.nested if name.startswith(f"{start}.")), "")
        inner = tree
        for key in prefix.split(".") if prefix else ():
            inner = inner.setdefault(key, {})  # type: ignore[assignment]
        inner[name.removeprefix(f"{prefix}.")] = value
    return tree
