"""Command lines that several tests start from."""

from __future__ import annotations

from megatron.config.run import RunConfig, parse

# The least that a run needs.
SMALL = (
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--micro-batch-size", "2", "--lr", "1e-3", "--train-iters", "10", "--mock-data", "--vocab-size", "500"),
)


def config(*words: str, without: tuple[str, ...] = (), world_size: int = 1) -> RunConfig:
    """The small run with further words, and without some of its flags."""
    base: list[str] = []
    skip = False
    for word in SMALL:
        if word.startswith("--"):
            skip = word in without
        if not skip:
            base.append(word)
    return parse([*base, *words], {"WORLD_SIZE": str(world_size)})
