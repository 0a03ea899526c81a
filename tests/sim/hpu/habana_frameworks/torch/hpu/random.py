"""SIMULATION of habana_frameworks.torch.hpu.random: the one generator of this process's card."""

from __future__ import annotations

from typing import Any

import torch

from tests.sim import runtime

default_generators = [runtime.library("hpu").default_generator(0)]


def _only_card(device: Any) -> torch.Generator:
    index = device if isinstance(device, int) else torch.device(device).index or 0
    if index != 0:
        raise RuntimeError("only device 0 is supported")
    return default_generators[0]


def manual_seed(seed: int) -> torch.Generator:
    """Seed the card's generator."""
    return default_generators[0].manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """The same, as there is one card."""
    manual_seed(seed)


def initial_seed() -> int:
    """The seed last set."""
    return default_generators[0].initial_seed()


def get_rng_state(device: Any = "hpu") -> torch.Tensor:
    """State, uint8 on the host."""
    return _only_card(device).get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "hpu") -> None:
    """Put back what `get_rng_state` returned."""
    _only_card(device).set_state(new_state)
