"""The order in which a corpus becomes samples: identical to Megatron's for the same seed, range, length and epochs.

A sample is `seq_length + 1` tokens; neighbouring samples share one. The documents of all epochs are shuffled, laid end
to end and cut; then the samples are shuffled. When the last epoch is used for less than 80 percent, its documents and
its samples are shuffled apart from the epochs before, so that no document is seen much more often than another.
Megatron-DeepSpeed and Megatron Core phrase the number of epochs differently, but it is the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_cache import load_array
from megatron.data.native import index_builder

_SEPARATE_BELOW = 0.80
_INT32_MAX = np.iinfo(np.int32).max
_UINT32_MAX = np.iinfo(np.uint32).max


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """How often a corpus is read, and which samples are shuffled together."""

    epochs: int
    tokens_per_epoch: int
    num_samples: int
    """Samples that all epochs hold: at least as many as were asked for."""
    first_group: int
    """Samples [0, first_group) and [first_group, num_samples) are shuffled apart."""

    @property
    def separate_last_epoch(self) -> bool:
        """Whether the last epoch is shuffled on its own."""
        return self.first_group < self.num_samples


def plan_epochs(
    tokens_per_epoch: int, seq_length: int, num_samples: int | None, exact_epochs: int | None = None
) -> EpochPlan:
    """Decide the number of epochs for `num_samples` samples of `seq_length` tokens (None: what one epoch holds).

    Raises:
        DataError: no tokens, or `exact_epochs` (--train-data-exact-num-epochs) does not fit the number of samples.
    """
    if tokens_per_epoch < 1 or (num_samples is None and exact_epochs is None and tokens_per_epoch <= seq_length):
        raise DataError(f"{tokens_per_epoch} tokens are too few for one sample of --seq-length {seq_length} (+ 1).")
    asked = 0 if num_samples is None else num_samples
    needed = max(1, -(-(asked * seq_length + 1) // tokens_per_epoch))
    epochs = needed if exact_epochs is None else exact_epochs
    total = (epochs * tokens_per_epoch - 1) // seq_length
    before_last = ((epochs - 1) * tokens_per_epoch - 1) // seq_length if epochs > 1 else 0
    if not before_last <= asked <= total and num_samples is not None:
        raise DataError(
            f"--train-data-exact-num-epochs {epochs} gives {before_last} to {total} samples, but {asked} are to be "
            "trained on. Change --train-iters / --train-samples or the number of epochs."
        )
    per_epoch = (tokens_per_epoch - 1) // seq_length
    separate = epochs > 1 and num_samples is not None and asked - before_last < int(_SEPARATE_BELOW * per_epoch)
    return EpochPlan(
        epochs=epochs,
        tokens_per_epoch=tokens_per_epoch,
        num_samples=total,
        first_group=before_last if separate else total,
    )


@dataclass(frozen=True, kw_only=True)
class SampleIndex:
    """The order of the samples. Sample k reads from row shuffle[k] of `samples` to the next row."""

    documents: npt.NDArray[np.int32]
    """[epochs * sequences] sequence numbers in reading order."""
    samples: npt.NDArray[np.signedinteger]
    """[n + 1, 2] int32 or int64: position in `documents`, token offset in that sequence."""
    shuffle: npt.NDArray[np.integer]
    """[n] uint32 or int64."""
    files: tuple[Path, Path, Path] | None = None
    """Where the three arrays are mapped from, if they are."""

    def __len__(self) -> int:
        return len(self.shuffle)

    def __reduce__(self) -> tuple[Callable[..., SampleIndex], tuple[object, ...]]:
        # Worker processes map cached arrays again instead of receiving a copy.
        if self.files is not None:
            return map_sample_index, (self.files,)
        return _in_memory, (self.documents, self.samples, self.shuffle)


def map_sample_index(files: tuple[Path, Path, Path]) -> SampleIndex:
    """Open the three arrays where they are cached."""
    documents, samples, shuffle = (load_array(file) for file in files)
    return SampleIndex(documents=documents, samples=samples, shuffle=shuffle, files=files)


def _in_memory(
    documents: npt.NDArray[np.int32], samples: npt.NDArray[np.signedinteger], shuffle: npt.NDArray[np.integer]
) -> SampleIndex:
    return SampleIndex(documents=documents, samples=samples, shuffle=shuffle)


def build_sample_index(
    lengths: npt.NDArray[np.int32], first: int, last: int, *, plan: EpochPlan, seq_length: int, seed: int
) -> SampleIndex:
    """Build the order over sequences [first, last) of a corpus with `lengths` [sequences].

    One random stream shuffles the documents, then the samples; both in two groups when the last epoch is separate.
    """
    native = index_builder()
    state = np.random.RandomState(seed)
    groups = [plan.epochs - 1, 1] if plan.separate_last_epoch else [plan.epochs]
    epoch = np.arange(first, last, dtype=np.int32)
    documents = np.concatenate([_shuffled(np.tile(epoch, count), state) for count in groups])
    aligned = np.require(lengths, np.int32, ["C", "A"])
    narrow = max(len(documents), int(aligned.max())) <= _INT32_MAX
    walk = native.build_sample_idx_int32 if narrow else native.build_sample_idx_int64
    samples = walk(aligned, documents, seq_length, plan.epochs, plan.tokens_per_epoch)
    dtype = np.uint32 if plan.num_samples < _UINT32_MAX - 1 else np.int64
    shuffle = np.arange(plan.num_samples, dtype=dtype)
    _shuffled(shuffle[: plan.first_group], state)
    _shuffled(shuffle[plan.first_group :], state)
    return SampleIndex(documents=documents, samples=samples, shuffle=shuffle)


def _shuffled(values: npt.NDArray[np.integer], state: np.random.RandomState) -> npt.NDArray[np.integer]:
    """Shuffle in place exactly as `state.shuffle(values)` would, several times faster; advances the state."""
    current = state.get_state(legacy=False)
    twister = current["state"]
    twister["pos"] = index_builder().shuffle(values, twister["key"], int(twister["pos"]))
    state.set_state(current)
    return values
