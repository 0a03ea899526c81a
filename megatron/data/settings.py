"""What the data path is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.data.errors import DataError
from megatron.data.instruction import InstructionRules


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the data is and how it becomes samples; names as on the command line.

    Raises:
        DataError: no data, or contradicting ways to give it.
    """

    seq_length: int
    seed: int
    data_path: tuple[str, ...] = ()
    """--data-path: one prefix, several, or weights and prefixes in turn; divided by `split`."""
    train_data_path: tuple[str, ...] = ()
    """--train-data-path and the next two: the same, for one split each and not divided."""
    valid_data_path: tuple[str, ...] = ()
    test_data_path: tuple[str, ...] = ()
    split: str = "969, 30, 1"
    mock_data: bool = False
    data_cache_path: Path | None = None
    """Folder of the index cache; None is `index-cache` beside the first data file."""
    train_data_exact_num_epochs: int | None = None
    mid_level_dataset_surplus: float = 0.005
    """Part by which each corpus of a weighted blend is prepared beyond its share."""
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    dataloader_type: Literal["single", "cyclic"] = "single"
    data_sharding: bool = False
    """With cyclic: Megatron's order per rank, which depends on the layout. Off, the order never does."""
    num_workers: int = 2
    instruction: InstructionRules | None = None
    """The paths are prefixes of instruction data (--is-instruction-dataset)."""

    def __post_init__(self) -> None:
        parts = self.per_split_paths
        ways = [bool(self.data_path), any(parts), self.mock_data]
        if sum(ways) != 1:
            raise DataError(
                "Give the data in exactly one way: --data-path, or --train-data-path (with --valid-data-path and "
                f"--test-data-path), or --mock-data; {sum(ways)} of them were given."
            )
        if any(parts) and not self.train_data_path:
            raise DataError("--valid-data-path and --test-data-path go with --train-data-path, which is missing.")
        if self.instruction is not None and self.mock_data:
            raise DataError("--is-instruction-dataset needs data with answers; --mock-data has none.")
        if self.instruction is not None and (
            self.reset_position_ids or self.reset_attention_mask or self.eod_mask_loss
        ):
            raise DataError(
                "--reset-position-ids, --reset-attention-mask and --eod-mask-loss are for pretraining data; examples "
                "of --is-instruction-dataset are kept apart by --neat-pack, and their labels say what is learned."
            )
        if self.seq_length < 1:
            raise DataError(f"--seq-length is {self.seq_length}; it must be at least 1.")
        if self.mid_level_dataset_surplus < 0:
            raise DataError(
                f"--mid-level-dataset-surplus is {self.mid_level_dataset_surplus}; it must not be negative."
            )
        if self.train_data_exact_num_epochs is not None and self.train_data_exact_num_epochs < 1:
            raise DataError(
                f"--train-data-exact-num-epochs is {self.train_data_exact_num_epochs}; it must be at least 1."
            )
        if not 0 <= self.seed < 2**32:
            raise DataError(f"--seed is {self.seed}; the order of the samples takes 0 to 2**32 - 1.")

    @property
    def per_split_paths(self) -> tuple[tuple[str, ...], ...]:
        """Paths of train, valid and test where they are given apart."""
        return self.train_data_path, self.valid_data_path, self.test_data_path


@dataclass(frozen=True, kw_only=True)
class SampleCounts:
    """Samples that a run takes of each split; None is every sample once, 0 leaves the split out."""

    train: int
    valid: int | None
    test: int | None


def sample_counts(
    train_samples: int, *, train_iters: int, eval_interval: int, eval_iters: int, global_batch_size: int
) -> SampleCounts:
    """The samples that a run takes, as Megatron counts them.

    Args:
        train_samples: of the whole run (train_iters * global_batch_size without --train-samples and ramp-up).
        train_iters: steps of the whole run.
        eval_interval: steps between evaluations.
        eval_iters: steps of one evaluation; -1 evaluates on all of the data each time.
        global_batch_size: samples of one step at the end of the ramp-up.

    Raises:
        DataError: `eval_iters` below -1, or `eval_interval` below 1.
    """
    if eval_iters < -1:
        raise DataError(f"--eval-iters is {eval_iters}; allowed: -1 (all of the data), 0 (none) or more.")
    if eval_iters == -1:
        return SampleCounts(train=train_samples, valid=None, test=None)
    if eval_interval < 1:
        raise DataError(f"--eval-interval is {eval_interval}; it must be at least 1.")
    evaluations = train_iters // eval_interval + 1
    per_evaluation = eval_iters * global_batch_size
    return SampleCounts(train=train_samples, valid=evaluations * per_evaluation, test=per_evaluation)


def read_data_args(path: Path) -> tuple[str, ...]:
    """The words of a file for --data-args-path: what would stand after --data-path.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    words = tuple(_text(path, "--data-args-path").split())
    if not words:
        raise DataError(f"--data-args-path {path} is empty.")
    return words


def read_per_split_data_args(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Paths of train, valid and test from a JSON file for --per-split-data-args-path.

    The file is an object with a list of words per split: {"train": ["0.3", "a", "0.7", "b"], "valid": ["c"]}.

    Raises:
        DataError: the file cannot be read or has another form.
    """
    try:
        content = json.loads(_text(path, "--per-split-data-args-path"))
    except ValueError as error:
        raise DataError(f"--per-split-data-args-path {path} is not JSON: {error}") from error
    names = ("train", "valid", "test")
    if not isinstance(content, dict) or not content.keys() <= set(names):
        raise DataError(f"--per-split-data-args-path {path} must be an object with the keys {', '.join(names)}.")
    parts = [content.get(name) or [] for name in names]
    if not all(isinstance(part, list) for part in parts):
        raise DataError(f"--per-split-data-args-path {path}: every split takes a list of weights and paths.")
    train, valid, test = (tuple(str(word) for word in part) for part in parts)
    return train, valid, test


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise DataError(f"{flag}: {error}") from error
