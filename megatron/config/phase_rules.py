"""Rules about the parts of a run, see `megatron.config.phases`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

Given = frozenset[str]


def parts_are_complete(
    scheduler_batch_size: tuple[int, ...] | None,
    batch_sched_samples: tuple[int, ...] | None,
    scheduler_seq_length: tuple[int, ...] | None,
) -> str | None:
    """Every part has a batch size, a start and, if any has, a length."""
    if scheduler_batch_size is None and batch_sched_samples is None and scheduler_seq_length is None:
        return None
    if scheduler_batch_size is None or batch_sched_samples is None:
        return "--scheduler-batch-size and --batch-sched-samples: give both, with one number for each part of the run"
    number = len(scheduler_batch_size)
    if {number} != {len(row) for row in (batch_sched_samples, scheduler_seq_length or batch_sched_samples)}:
        return (
            f"--scheduler-batch-size {_words(scheduler_batch_size)}: --batch-sched-samples and --scheduler-seq-length "
            f"must have {number} numbers, too"
        )
    if batch_sched_samples[0] != 0 or any(one >= other for one, other in pairwise(batch_sched_samples)):
        return f"--batch-sched-samples {_words(batch_sched_samples)}: must begin with 0 and rise: the starts of parts"
    return None


def parts_end_at_the_settings(
    scheduler_batch_size: tuple[int, ...] | None,
    scheduler_seq_length: tuple[int, ...] | None,
    global_batch_size: int,
    seq_length: int,
) -> str | None:
    """The last part is what evaluations and estimates are about."""
    for flag, row, whole in (
        ("batch-size", scheduler_batch_size, global_batch_size),
        ("seq-length", scheduler_seq_length, seq_length),
    ):
        if row and row[-1] != whole:
            name = "--global-batch-size" if flag == "batch-size" else "--seq-length"
            return f"--scheduler-{flag} {_words(row)}: must end with {name}, which is {whole}"
    return None


def parts_can_be_cut(
    scheduler_batch_size: tuple[int, ...] | None,
    scheduler_seq_length: tuple[int, ...] | None,
    seq_length: int,
    micro_batch_size: int,
    data_parallel_size: int,
) -> str | None:
    """Whole samples of the data give whole batches, on every rank."""
    lengths = scheduler_seq_length or ()
    wrong = [length for length in lengths if seq_length % length]
    if wrong:
        return f"--scheduler-seq-length {_words(lengths)}: {wrong[0]} must divide --seq-length {seq_length}"
    batches = scheduler_batch_size or ()
    for batch, length in zip(batches, lengths or [seq_length] * len(batches), strict=False):
        whole = micro_batch_size * data_parallel_size * (seq_length // length)
        if batch % whole:
            return (
                f"--scheduler-batch-size {_words(batches)}: {batch} must be a multiple of {whole} = --micro-batch-size "
                f"{micro_batch_size} x data-parallel size {data_parallel_size} x --seq-length {seq_length} / {length}"
            )
    return None


def parts_of_a_sequence_can_be_shared(
    scheduler_seq_length: tuple[int, ...] | None,
    sequence_parallel: bool,
    tensor_model_parallel_size: int,
    ring_parallel_size: int,
    ulysses_parallel_size: int,
) -> str | None:
    """Samples are cut into shorter ones where a rank has them whole, and tensor-parallel ranks have equal parts."""
    ranks = ring_parallel_size * ulysses_parallel_size
    if scheduler_seq_length is not None and ranks > 1:
        return (
            f"--scheduler-seq-length {_words(scheduler_seq_length)}: not with {ranks} ranks that share every sequence; "
            "leave out --context-parallel-size and --ds-sequence-parallel-size"
        )
    share = tensor_model_parallel_size if sequence_parallel else 1
    wrong = [length for length in scheduler_seq_length or () if length % share]
    return (
        f"--scheduler-seq-length {wrong[0]}: must be a multiple of {share}, the parts of a sequence" if wrong else None
    )


def parts_count_samples(
    scheduler_batch_size: tuple[int, ...] | None, rampup_batch_size: tuple[str, ...] | None, given: Given
) -> str | None:
    """With a growing batch neither iterations nor tokens are a unit of length, and it grows in one way."""
    if scheduler_batch_size is None:
        return None
    if rampup_batch_size is not None:
        return "--scheduler-batch-size and --rampup-batch-size: give one of them"
    wrong = [name for name in ("train_iters", "train_tokens") if name in given]
    if wrong:
        return f"--{wrong[0].replace('_', '-')}: with --scheduler-batch-size give --train-samples instead"
    return None


def parts_are_of_text(
    scheduler_seq_length: tuple[int, ...] | None,
    is_instruction_dataset: bool,
    deepspeed: bool,
    pipeline_model_parallel_size: int,
) -> str | None:
    """What cannot be cut, or cannot change its shape in the middle of a run."""
    if scheduler_seq_length is None:
        return None
    if is_instruction_dataset:
        return "--scheduler-seq-length: not with --is-instruction-dataset, whose samples are conversations"
    if deepspeed and pipeline_model_parallel_size > 1:
        return "--scheduler-seq-length: not with DeepSpeed's pipelines, which have one shape; leave --deepspeed out"
    return None


def _words(numbers: Sequence[int]) -> str:
    return " ".join(str(number) for number in numbers)


RULES: tuple[Callable[..., str | None], ...] = (
    parts_are_complete,
    parts_end_at_the_settings,
    parts_can_be_cut,
    parts_of_a_sequence_can_be_shared,
    parts_count_samples,
    parts_are_of_text,
)
