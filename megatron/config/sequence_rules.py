"""Rules about ranks that share sequences; see `megatron.config.rules` for how they are run."""

from __future__ import annotations

from collections.abc import Callable

Rule = Callable[..., str | None]


def sequence_is_shared_evenly(
    seq_length: int,
    ring_parallel_size: int,
    ulysses_parallel_size: int,
    sequence_parallel: bool,
    tensor_model_parallel_size: int,
) -> str | None:
    """Every rank has the same number of tokens; those of a ring have an early and a late chunk of each sequence."""
    ranks = ring_parallel_size * ulysses_parallel_size
    multiple, flags = 2 * ranks if ring_parallel_size > 1 else ranks, _flags(ring_parallel_size, ulysses_parallel_size)
    if seq_length % multiple:
        twice = "2 x " if ring_parallel_size > 1 else ""
        return f"--seq-length {seq_length}: must be a multiple of {multiple} = {twice}{flags}"
    if sequence_parallel and seq_length % (ranks * tensor_model_parallel_size):
        return (
            f"--seq-length {seq_length}: must be a multiple of --tensor-model-parallel-size "
            f"{tensor_model_parallel_size}{f' x {flags}' if ranks > 1 else ''} with --sequence-parallel"
        )
    return None


def _flags(ring: int, ulysses: int) -> str:
    """The ranks that share a sequence, as a product of flags."""
    sizes = {"--context-parallel-size": ring, "--ds-sequence-parallel-size": ulysses}
    return " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)


def heads_are_shared_evenly(
    num_attention_heads: int, tensor_model_parallel_size: int, ulysses_parallel_size: int
) -> str | None:
    """Every rank that shares sequences by heads has as many heads."""
    heads = num_attention_heads // tensor_model_parallel_size
    if heads % ulysses_parallel_size:
        return (
            f"--ds-sequence-parallel-size {ulysses_parallel_size}: must divide {heads} = --num-attention-heads "
            f"{num_attention_heads} / --tensor-model-parallel-size {tensor_model_parallel_size}"
        )
    return None


def heads_are_shared_by_one_flag(cp_comm_type: str, ds_sequence_parallel_size: int) -> str | None:
    """The two flags mean the same ranks."""
    if cp_comm_type == "a2a" and ds_sequence_parallel_size > 1:
        return (
            f"--cp-comm-type a2a: not with --ds-sequence-parallel-size {ds_sequence_parallel_size}; both share "
            "sequences by heads, give one of them"
        )
    return None


def ring_drops_no_attention(attention_dropout: float, ring_parallel_size: int) -> str | None:
    """Attention in pieces has no dropout: kernels could not repeat the masks of pieces in the backward pass."""
    if ring_parallel_size > 1 and attention_dropout > 0.0:
        return (
            f"--attention-dropout {attention_dropout}: must be 0 with --context-parallel-size {ring_parallel_size}; or "
            "share sequences by heads, with --ds-sequence-parallel-size"
        )
    return None


RULES: tuple[Rule, ...] = (
    sequence_is_shared_evenly,
    heads_are_shared_evenly,
    heads_are_shared_by_one_flag,
    ring_drops_no_attention,
)
