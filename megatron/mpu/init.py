"""Initial weights that do not depend on the layout.

A logical tensor is cut into blocks of rows; each block has its own generator, seeded from (seed, name, block), and is
drawn on the CPU in float32. A rank draws the blocks that hold its rows and cuts out its part: every layout, engine
and device starts from the same numbers. (CPU instruction sets may differ in the last bit of a normal deviate.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How the elements of one tensor are drawn.

    Attributes:
        kind: "normal" with mean 0, "uniform" in [-scale, scale), or "constant".
        scale: the standard deviation, the bound, or the constant.
    """

    kind: Literal["normal", "uniform", "constant"]
    scale: float


def xavier_uniform(rows: int, columns: int) -> Distribution:
    """Uniform with bound sqrt(6 / (rows + columns)), for a logical weight [rows, columns].

    Paper: Glorot and Bengio 2010.
    """
    return Distribution(kind="uniform", scale=math.sqrt(6.0 / (rows + columns)))


def block_seed(seed: int, name: str, block: int) -> int:
    """The 64-bit seed of one block of rows: the first 8 bytes of SHA-256 of "seed/name/block"."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()[:8], "little")


def draw(
    name: str, logical_shape: Sequence[int], index: Sequence[slice], distribution: Distribution, *, seed: int
) -> Tensor:
    """The part of a logical tensor that `index` cuts out, float32 on the CPU.

    The value of an element depends on seed, name, its row and column and the number of columns; not on the number
    of rows, so padding a vocabulary further leaves its words alone.

    Args:
        name: logical parameter name.
        logical_shape: shape of the whole tensor, [rows] or [rows, columns].
        index: one slice with start and stop per dimension.
        distribution: of the elements.
        seed: of the run.
    """
    rows, *rest = index
    part = torch.empty([at.stop - at.start for at in index], dtype=torch.float32)
    if distribution.kind == "constant":
        return part.fill_(distribution.scale)
    for block in range(rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS)):
        first = block * BLOCK_ROWS
        start, stop = max(rows.start, first), min(rows.stop, first + BLOCK_ROWS)
        values = _draw_block((BLOCK_ROWS, *logical_shape[1:]), distribution, block_seed(seed, name, block))
        inside = (slice(start - first, stop - first), *rest)
        part[start - rows.start : stop - rows.start] = values[inside]
    return part


def _draw_block(shape: tuple[int, ...], distribution: Distribution, seed: int) -> Tensor:
    """One block, always drawn in full: its values must not depend on how many of its rows exist."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(shape, dtype=torch.float32)
    if distribution.kind == "normal":
        return block.normal_(0.0, distribution.scale, generator=generator)
    return block.uniform_(-distribution.scale, distribution.scale, generator=generator)
