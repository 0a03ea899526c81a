"""Dropout without random state: every mask follows from numbers that are known anyway.

Before each dropout region the device's default generator is seeded from the run's and sample's seed, the layer, the
place in the layer and, where the tensor is split, the rank. Recomputing a layer, resuming a run or changing the
pipeline split therefore reproduces the masks with nothing saved. The generator's state is not restored afterwards:
nothing else in this project draws from a device's default generator, and nothing may rely on its state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from megatron.mpu.groups import ProcessGroups

Site = Literal["embedding", "attention", "attention_output", "mlp_output", "router"]
_SITES: tuple[Site, ...] = ("embedding", "attention", "attention_output", "mlp_output", "router")
_MASK = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """The finaliser of the SplitMix64 generator: a bijection of 64-bit integers that scatters all bits.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix(values: Iterable[int]) -> int:
    """A 64-bit seed from a sequence of integers; order counts: h = splitmix64(h xor value), from h = 0."""
    seed = 0
    for value in values:
        seed = splitmix64(seed ^ (value & _MASK))
    return seed


def dropout_seed(base: int, layer: int, site: Site, groups: ProcessGroups, *, split: bool) -> int:
    """The seed of one dropout region.

    Args:
        base: seed of the micro-batch, from the run's seed and the position of its samples in the data.
        layer: global layer number.
        site: the region within the layer.
        groups: this process's groups; context-parallel ranks hold different tokens and always differ.
        split: the tensor is split over tensor-parallel ranks, which must then draw different masks; a replicated
            tensor needs the same mask on all of them.
    """
    return mix((base, layer, _SITES.index(site), groups.cp.rank, groups.tp.rank + 1 if split else 0))


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the default generator of a device (all default generators, if its module cannot seed its own)."""
    seeder = getattr(torch.get_device_module(device), "manual_seed", torch.manual_seed)
    seeder(seed)
