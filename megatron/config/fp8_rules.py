"""Rules about 8-bit numbers; see `megatron.config.rules` for how they are run."""

from __future__ import annotations

from megatron.config.run_rules import Given, Rule

_DELAYED_ONLY = {
    "fp8_interval": "--fp8-interval",
    "fp8_amax_history_len": "--fp8-amax-history-len",
    "fp8_amax_compute_algo": "--fp8-amax-compute-algo",
}
_FORMAT_ONLY = {
    **_DELAYED_ONLY,
    "fp8_recipe": "--fp8-recipe",
    "fp8_margin": "--fp8-margin",
    "fp8_amax_reduce": "--fp8-amax-reduce",
    "fp8_wgrad": "--no-fp8-wgrad",
    "cache_fp8_weight": "--cache-fp8-weight",
}
_STEP = 16


def eight_bits_have_a_format(fp8_format: str | None, transformer_impl: str, given: Given) -> str | None:
    """How to scale numbers says nothing without such numbers."""
    if fp8_format is not None:
        return None
    used = [flag for name, flag in _FORMAT_ONLY.items() if name in given]
    used += ["--transformer-impl transformer_engine"] if transformer_impl == "transformer_engine" else []
    return f"{', '.join(used)}: only with --fp8-format" if used else None


def history_is_for_delayed_scaling(fp8_format: str | None, fp8_recipe: str, given: Given) -> str | None:
    """Scales that follow from a tensor itself need no history."""
    used = [flag for name, flag in _DELAYED_ONLY.items() if name in given]
    if fp8_format is not None and fp8_recipe != "delayed" and used:
        return f"{', '.join(used)}: only with --fp8-recipe delayed, which is {fp8_recipe}"
    return None


def eight_bit_products_are_plain(
    fp8_format: str | None, use_torch_compile: bool, num_experts: tuple[int, ...]
) -> str | None:
    """What 8-bit layers do not go together with."""
    if fp8_format is None:
        return None
    others = {
        "--use-torch-compile true": use_torch_compile,
        "--num-experts": num_experts != (1,),
    }
    used = [flag for flag, is_used in others.items() if is_used]
    return f"--fp8-format {fp8_format}: not with {', '.join(used)}; leave one of them out" if used else None


def eight_bit_products_have_whole_blocks(
    fp8_format: str | None,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    kv_channels: int,
    tensor_model_parallel_size: int,
) -> str | None:
    """Matrix units take 8-bit numbers in blocks of 16: features of a rank."""
    if fp8_format is None:
        return None
    ranks = tensor_model_parallel_size
    over = f"over {ranks} tensor-parallel ranks"
    counts = {
        f"--hidden-size {hidden_size}": hidden_size,
        f"--ffn-hidden-size {ffn_hidden_size} {over}": ffn_hidden_size // ranks,
        f"--num-attention-heads {num_attention_heads} x --kv-channels {kv_channels} {over}": (
            num_attention_heads * kv_channels // ranks
        ),
        f"--num-key-value-heads {num_key_value_heads} x --kv-channels {kv_channels} {over}": (
            max(1, num_key_value_heads // ranks) * kv_channels
        ),
    }
    wrong = [text for text, count in counts.items() if count % _STEP]
    return f"--fp8-format {fp8_format}: {wrong[0]} must be a multiple of {_STEP}" if wrong else None


def eight_bit_products_have_whole_blocks_of_tokens(
    fp8_format: str | None,
    micro_batch_size: int,
    seq_length: int,
    scheduler_seq_length: tuple[int, ...] | None,
    ring_parallel_size: int,
    ulysses_parallel_size: int,
) -> str | None:
    """The same for the tokens of a micro-batch on a rank, in every part of the run."""
    if fp8_format is None:
        return None
    share = ring_parallel_size * ulysses_parallel_size
    lengths = scheduler_seq_length or (seq_length,)
    wrong = [str(length) for length in dict.fromkeys(lengths) if micro_batch_size * length // share % _STEP]
    flag = "--seq-length" if scheduler_seq_length is None else "--scheduler-seq-length"
    over = f" over {share} ranks that share a sequence" if share > 1 else ""
    text = f"--micro-batch-size {micro_batch_size} x {flag} {', '.join(wrong)}{over}"
    return f"--fp8-format {fp8_format}: {text} must be a multiple of {_STEP}" if wrong else None


RULES: tuple[Rule, ...] = (
    eight_bits_have_a_format,
    history_is_for_delayed_scaling,
    eight_bit_products_are_plain,
    eight_bit_products_have_whole_blocks,
    eight_bit_products_have_whole_blocks_of_tokens,
)
