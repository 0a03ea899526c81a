"""From settings to the streams of micro-batches of this rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from megatron.config.run import RunConfig
from megatron.data.datasets import Fim
from megatron.data.errors import DataError
from megatron.data.fim import FimSettings, find_tokens
from megatron.data.instruction import InstructionRules
from megatron.data.loader import Consumed, DataIterators, build_data_iterators
from megatron.data.samplers import Share
from megatron.data.settings import (
    DataSettings,
    SampleCounts,
    read_data_args,
    read_per_split_data_args,
    sample_counts,
)
from megatron.tokenizer import Tokenizer
from megatron.training.microbatches import BatchPlan
from megatron.training.setup import Session
from megatron.training.state import TrainState


def build_data(
    config: RunConfig,
    session: Session,
    tokenizer: Tokenizer,
    plan: BatchPlan,
    state: TrainState,
    report: Callable[[str], None],
) -> DataIterators:
    """The streams, going on where `state` is. Called by all ranks."""
    groups = session.groups
    share = Share(rank=groups.dp.rank, size=groups.dp.size, micro_batch_size=config.training.micro_batch_size)
    return build_data_iterators(
        data_settings(config, tokenizer.eod if tokenizer.pad is None else tokenizer.pad),
        counts(config, plan),
        share=share,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        consumed=Consumed(train=plan.read(state.samples), valid=state.valid_samples),
        pin_memory=session.accelerator.capabilities.pinned_memory,
        report=report,
        fim=fim(config, tokenizer) if config.data.fim_data else None,
        part=groups.sequence_part,
    )


def data_settings(config: RunConfig, pad: int) -> DataSettings:
    """What the flags say about the data; `pad` is the token that fills samples of instruction data up.

    Raises:
        DataError: flags that contradict each other.
    """
    data = config.data
    if (data.neat_pack or data.variable_seq_lengths) and not data.is_instruction_dataset:
        raise DataError("--neat-pack and --variable-seq-lengths go with --is-instruction-dataset, which is missing.")
    paths = data.data_path or ()
    parts = (data.train_data_path or (), data.valid_data_path or (), data.test_data_path or ())
    if data.data_args_path is not None:
        paths = read_data_args(Path(data.data_args_path))
    if data.per_split_data_args_path is not None:
        parts = read_per_split_data_args(Path(data.per_split_data_args_path))
    return DataSettings(
        seq_length=data.seq_length,
        seed=config.training.seed,
        data_path=paths,
        train_data_path=parts[0],
        valid_data_path=parts[1],
        test_data_path=parts[2],
        split=data.split,
        mock_data=data.mock_data,
        data_cache_path=Path(data.data_cache_path) if data.data_cache_path else None,
        train_data_exact_num_epochs=data.train_data_exact_num_epochs,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        dataloader_type=data.dataloader_type,
        num_workers=data.num_workers,
        instruction=instruction_rules(config, pad) if data.is_instruction_dataset else None,
    )


def fim(config: RunConfig, tokenizer: Tokenizer) -> Fim:
    """What the flags say about filling in the middle.

    Raises:
        DataError: they contradict each other, or the tokenizer lacks a token.
    """
    if config.data.is_instruction_dataset or config.data.mock_data:
        raise DataError("--fim-data rearranges text; it goes neither with --is-instruction-dataset nor --mock-data.")
    data = config.data
    settings = FimSettings(
        rate=data.fim_rate,
        spm_rate=data.fim_spm_rate,
        split_sample=data.fim_split_sample,
        fragment_rate=data.fim_fragment_rate,
        no_prefix=data.fim_no_prefix,
        prefix_token=data.fim_prefix_token,
        middle_token=data.fim_middle_token,
        suffix_token=data.fim_suffix_token,
        pad_token=data.fim_pad_token,
        eod_token=data.fim_eod_token,
    )
    return settings, find_tokens(settings, tokenizer, tokenizer.eod), tokenizer


def instruction_rules(config: RunConfig, pad: int) -> InstructionRules:
    """What the flags say about instruction data."""
    parallel = config.parallel
    shared = parallel.context_parallel_size * parallel.ds_sequence_parallel_size
    split = parallel.pipeline_model_parallel_size > 1 or shared > 1
    if config.data.variable_seq_lengths and split:
        raise DataError(
            "--variable-seq-lengths needs --pipeline-model-parallel-size 1, --context-parallel-size 1 and "
            "--ds-sequence-parallel-size 1: stages and parts of a sequence agree on its length beforehand. Leave it "
            "out; --neat-pack leaves little padding."
        )
    multiple = math.lcm(8, parallel.tensor_model_parallel_size)
    return InstructionRules(
        pad=pad, pack=config.data.neat_pack, pad_to_longest=config.data.variable_seq_lengths, multiple=multiple
    )


def counts(config: RunConfig, plan: BatchPlan) -> SampleCounts:
    """Samples that the run takes of each split."""
    training = config.training
    if training.skip_train:
        return sample_counts(
            0,
            train_iters=0,
            eval_interval=1,
            eval_iters=training.eval_iters,
            global_batch_size=training.global_batch_size,
        )
    return sample_counts(
        plan.read(training.train_samples or training.train_iters * training.global_batch_size),
        train_iters=training.train_iters,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        global_batch_size=training.global_batch_size,
    )
