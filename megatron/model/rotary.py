"""Positions that attention sees: rotary tables and ALiBi slopes. Computed in float32 whatever the model's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.config.architecture import Architecture, RopeScaling
from megatron.mpu.groups import Group


def rotary_frequencies(arch: Architecture) -> Tensor:
    """Angle per position of each pair of channels, float32 [r/2] on the CPU.

    r = rope_percent * head dim channels rotate; pair j turns by theta^(-2j/r) per position (Su et al. 2021). With
    position interpolation all angles shrink by the same factor (Chen et al. 2023); LLaMA 3.1 shrinks the slow ones.

    Raises:
        ValueError: if the number of rotated channels is odd.
    """
    rotated = int(arch.head_dim * arch.rope_percent)
    if rotated % 2:
        raise ValueError(
            f"--rotary-percent {arch.rope_percent} of {arch.head_dim} channels per head rotates {rotated}; "
            f"the number must be even"
        )
    pairs = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
    frequencies = 1.0 / arch.rope_theta**pairs
    if arch.rope_scaling is not None:
        frequencies = _scaled(frequencies, arch.rope_scaling)
    return frequencies / arch.rope_interpolation


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """LLaMA 3.1: long wavelengths are divided by `factor`, short ones stay, those between are blended."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (scaling.original_max_positions / wavelengths - low) / (high - low)
    kept = kept.clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def rotary_tables(
    frequencies: Tensor, length: int, position_ids: Tensor | None, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all angles.

    Args:
        frequencies: [r/2] float32.
        length: s, used when there are no position ids.
        position_ids: [b, s] int64, or None for 0 .. s-1.
        interleaved: channels 2j and 2j+1 form pair j; otherwise channels j and j + r/2.

    Returns:
        Two float32 tensors [s, 1 or b, 1, r].
    """
    if position_ids is None:
        positions = torch.arange(length, dtype=torch.float32, device=frequencies.device)[:, None]
    else:
        positions = position_ids.transpose(0, 1).float()
    angles = positions[:, :, None, None] * frequencies
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head's linear bias (Press et al. 2022).

    For a power of two, 2^(-8i/n) for head i = 1 .. n. Otherwise the slopes of the power of two below, followed by every
    second one of the power of two above: the authors' rule, which BLOOM uses.
    """
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    return slopes + [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(num_heads - below)]


class Positions:
    """Makes the position inputs of the layers; small constants are kept per device, nothing is a parameter or buffer.

    Being neither, they need no initialisation after construction on the meta device, and FSDP leaves them alone.

    Args:
        arch: the shape of the model.
        tp: the tensor-parallel ranks, over which the heads are split.
    """

    def __init__(self, arch: Architecture, tp: Group) -> None:
        self._arch = arch
        self._constants: Tensor | None = None
        if arch.position == "rope":
            self._constants = rotary_frequencies(arch)
        elif arch.position == "alibi":
            heads = arch.num_heads // tp.size
            own = alibi_slopes(arch.num_heads)[tp.rank * heads : (tp.rank + 1) * heads]
            self._constants = torch.tensor(own, dtype=torch.float32, device="cpu")
        self._per_device: dict[torch.device, Tensor] = {}

    def rotary(self, length: int, position_ids: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine tables, see `rotary_tables`; None for other kinds of positions."""
        if self._arch.position != "rope":
            return None
        return rotary_tables(self._on(device), length, position_ids, interleaved=self._arch.rope_interleaved)

    def slopes(self, device: torch.device) -> Tensor | None:
        """ALiBi slopes of this rank's heads, float32 [n/t]; None for other kinds of positions."""
        return self._on(device) if self._arch.position == "alibi" else None

    def _on(self, device: torch.device) -> Tensor:
        assert self._constants is not None
        if device not in self._per_device:
            self._per_device[device] = self._constants.to(device)
        return self._per_device[device]
