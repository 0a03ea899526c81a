"""Rules about the model, the layout, the vocabulary and the data; see `megatron.config.rules` for how they are run."""

from __future__ import annotations

from collections.abc import Callable

Rule = Callable[..., str | None]
Strings = tuple[str, ...]


def world_is_a_multiple_of_the_model(
    world_size: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    context_parallel_size: int,
    ds_sequence_parallel_size: int,
) -> str | None:
    """Every copy of the model, and of the sequence it trains on, takes the same number of ranks."""
    ranks = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    ranks *= ds_sequence_parallel_size
    if world_size % ranks:
        by_heads = f" x --ds-sequence-parallel-size {ds_sequence_parallel_size}" * (ds_sequence_parallel_size > 1)
        return (
            f"world size {world_size}: must be a multiple of {ranks} = --tensor-model-parallel-size "
            f"{tensor_model_parallel_size} x --pipeline-model-parallel-size {pipeline_model_parallel_size} x "
            f"--context-parallel-size {context_parallel_size}{by_heads}"
        )
    return None


def no_pipeline_is_kept(pipeline_model_parallel_size: int, given: frozenset[str]) -> str | None:
    """The two flags contradict each other."""
    if "no_pipeline_parallel" in given and pipeline_model_parallel_size > 1:
        return f"--pipeline-model-parallel-size {pipeline_model_parallel_size}: must be 1 with --no-pipeline-parallel"
    return None


def query_heads_split(num_attention_heads: int, tensor_model_parallel_size: int) -> str | None:
    """Each tensor-parallel rank has whole heads."""
    return _multiple("--num-attention-heads", num_attention_heads, tensor_model_parallel_size)


def kv_heads_split(num_key_value_heads: int, num_attention_heads: int, tensor_model_parallel_size: int) -> str | None:
    """Each tensor-parallel rank has whole key and value heads, or all copies of a head serve as many query heads."""
    heads, ranks = num_key_value_heads, tensor_model_parallel_size
    if heads != num_attention_heads and max(heads, ranks) % min(heads, ranks):
        return (
            f"--num-key-value-heads {heads}: must be a multiple of --tensor-model-parallel-size {ranks}, or divide it "
            "(then ranks hold copies of heads)"
        )
    return None


def kv_copies_are_those_needed(
    kv_replicator: int, num_key_value_heads: int, tensor_model_parallel_size: int
) -> str | None:
    """There are as many copies of a key and value head as it takes to give one to every rank."""
    needed = max(1, tensor_model_parallel_size // num_key_value_heads)
    if kv_replicator != needed:
        return (
            f"--kv-replicator {kv_replicator}: must be {needed}, for --num-key-value-heads {num_key_value_heads} and "
            f"--tensor-model-parallel-size {tensor_model_parallel_size}; it can be left out"
        )
    return None


def ffn_splits(ffn_hidden_size: int, tensor_model_parallel_size: int) -> str | None:
    """Each tensor-parallel rank has the same part of the feed-forward block."""
    return _multiple("--ffn-hidden-size", ffn_hidden_size, tensor_model_parallel_size)


def padded_vocabulary_splits(padded_vocab_size: int, tensor_model_parallel_size: int) -> str | None:
    """Each tensor-parallel rank has the same number of rows of the embedding."""
    return _multiple("--padded-vocab-size", padded_vocab_size, tensor_model_parallel_size)


def _multiple(flag: str, value: int, ranks: int) -> str | None:
    if value % ranks:
        return f"{flag} {value}: must be a multiple of --tensor-model-parallel-size {ranks}"
    return None


def heads_divide_hidden(hidden_size: int, num_attention_heads: int, kv_channels: int | None) -> str | None:
    """Without --kv-channels the width of a head is a quotient."""
    if kv_channels is None and hidden_size % num_attention_heads:
        return (
            f"--hidden-size {hidden_size}: must be a multiple of --num-attention-heads {num_attention_heads}, "
            "or give --kv-channels"
        )
    return None


def query_heads_share_kv_heads(num_attention_heads: int, num_key_value_heads: int) -> str | None:
    """Every key and value head serves the same number of query heads."""
    if num_attention_heads % num_key_value_heads:
        return f"--num-key-value-heads {num_key_value_heads}: must divide --num-attention-heads {num_attention_heads}"
    return None


def groups_are_counted(preset: str | None, given: frozenset[str]) -> str | None:
    """Grouped-query attention without a number of groups means different things to different Megatrons."""
    if "group_query_attention" in given and "num_key_value_heads" not in given and preset is None:
        return "--group-query-attention: needs the number of groups; give --num-query-groups"
    return None


def sequence_fits_positions(seq_length: int, max_position_embeddings: int) -> str | None:
    """A sample is no longer than what the model is made for."""
    if seq_length > max_position_embeddings:
        return (
            f"--seq-length {seq_length}: must be at most --max-position-embeddings {max_position_embeddings}; "
            "shorten the one or raise the other"
        )
    return None


def rotary_settings_have_rope(position_embedding_type: str, given: frozenset[str]) -> str | None:
    """Settings of rotary embeddings would be ignored without them."""
    rotary = {
        "rope_theta": "--rotary-base",
        "rotary_percent": "--rotary-percent",
        "rotary_interleaved": "--rotary-interleaved",
        "rotary_seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor",
        "use_rope_scaling": "--use-rope-scaling",
    }
    flags = [flag for name, flag in rotary.items() if name in given]
    if flags and position_embedding_type != "rope":
        return f"{', '.join(flags)}: only with --position-embedding-type rope, which is {position_embedding_type}"
    return None


def rotated_part_is_even(position_embedding_type: str, kv_channels: int, rotary_percent: float) -> str | None:
    """Rotations act on pairs."""
    rotated = int(kv_channels * rotary_percent)
    if position_embedding_type == "rope" and (rotated % 2 or rotated == 0):
        return (
            f"--rotary-percent {rotary_percent} of --kv-channels {kv_channels} is {rotated}: "
            "must be an even number above 0"
        )
    return None


def one_way_to_stretch_positions(
    use_rope_scaling: bool, rotary_seq_len_interpolation_factor: int | None, given: frozenset[str]
) -> str | None:
    """Interpolation and LLaMA's rescaling exclude each other."""
    if use_rope_scaling and rotary_seq_len_interpolation_factor not in (None, 1):
        return "--use-rope-scaling and --rotary-seq-len-interpolation-factor: give one of them"
    if "rope_scaling_factor" in given and not use_rope_scaling:
        return "--rope-scaling-factor: only with --use-rope-scaling"
    return None


def dropout_keeps_something(attention_dropout: float, hidden_dropout: float) -> str | None:
    """Dropping everything leaves nothing to scale up."""
    for flag, value in (("--attention-dropout", attention_dropout), ("--hidden-dropout", hidden_dropout)):
        if value >= 1:
            return f"{flag} {value}: must be below 1"
    return None


def residual_format_differs(fp32_residual_connection: bool, params_dtype: str) -> str | None:
    """In a float32 model the residual stream is in float32 anyway."""
    if fp32_residual_connection and params_dtype == "float32":
        return "--fp32-residual-connection: only with --bf16 or --fp16"
    return None


def vocabulary_is_known(tokenizer_type: str, vocab_size: int | None) -> str | None:
    """A NullTokenizer has no file that tells its size."""
    if tokenizer_type == "NullTokenizer" and vocab_size is None:
        return "--vocab-size: needed with --tokenizer-type NullTokenizer"
    return None


def tokenizer_has_its_files(
    tokenizer_type: str, tokenizer_model: str | None, vocab_file: str | None, merge_file: str | None
) -> str | None:
    """Every tokenizer but the null one is read from files."""
    if tokenizer_type.startswith("BertWordPiece"):
        return f"--tokenizer-type {tokenizer_type}: this distribution trains decoder-only language models; use another"
    if tokenizer_type == "GPT2BPETokenizer" and not (vocab_file and merge_file):
        return "--tokenizer-type GPT2BPETokenizer: give --vocab-file and --merge-file, or another --tokenizer-type"
    if tokenizer_type not in ("GPT2BPETokenizer", "NullTokenizer") and not tokenizer_model:
        return f"--tokenizer-type {tokenizer_type}: give --tokenizer-model"
    return None


def vocabulary_is_padded_once(padded_vocab_size: int | None, pad_vocab_size: bool) -> str | None:
    """The two flags contradict each other."""
    if padded_vocab_size is not None and not pad_vocab_size:
        return f"--padded-vocab-size {padded_vocab_size}: not together with --no-pad-vocab-size"
    return None


def unpadded_vocabulary_is_whole(pad_vocab_size: bool, tensor_model_parallel_size: int) -> str | None:
    """Ranks share the rows of the embedding equally."""
    if not pad_vocab_size and tensor_model_parallel_size > 1:
        return (
            f"--no-pad-vocab-size: only with --tensor-model-parallel-size 1, which is {tensor_model_parallel_size}; "
            "give --padded-vocab-size instead"
        )
    return None


def data_has_one_source(
    data_path: Strings | None,
    train_data_path: Strings | None,
    valid_data_path: Strings | None,
    test_data_path: Strings | None,
    data_args_path: str | None,
    per_split_data_args_path: str | None,
    mock_data: bool,
) -> str | None:
    """Data comes from one list for all splits, from one list per split, or from nowhere."""
    sources = {
        "--data-path": data_path is not None,
        "--data-args-path": data_args_path is not None,
        "--train-data-path, --valid-data-path, --test-data-path": (train_data_path, valid_data_path, test_data_path)
        != (None, None, None),
        "--per-split-data-args-path": per_split_data_args_path is not None,
        "--mock-data": mock_data,
    }
    used = [flags for flags, is_used in sources.items() if is_used]
    if not used:
        return "no training data: give --data-path, --train-data-path or --mock-data"
    if len(used) > 1:
        return f"{' and '.join(used)}: give one source of data"
    if (valid_data_path or test_data_path) and train_data_path is None:
        return f"{used[0]}: --train-data-path is missing"
    if data_path == () or train_data_path == ():
        return f"{used[0]}: needs at least one prefix"
    return None


RULES: tuple[Rule, ...] = (
    world_is_a_multiple_of_the_model,
    no_pipeline_is_kept,
    query_heads_split,
    kv_heads_split,
    kv_copies_are_those_needed,
    ffn_splits,
    padded_vocabulary_splits,
    heads_divide_hidden,
    query_heads_share_kv_heads,
    groups_are_counted,
    sequence_fits_positions,
    rotary_settings_have_rope,
    rotated_part_is_even,
    one_way_to_stretch_positions,
    dropout_keeps_something,
    residual_format_differs,
    vocabulary_is_known,
    tokenizer_has_its_files,
    vocabulary_is_padded_once,
    unpadded_vocabulary_is_whole,
    data_has_one_source,
)
