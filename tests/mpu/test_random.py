"""Dropout seeds."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron.mpu.groups import Group, ProcessGroups, single_process
from megatron.mpu.random import dropout_seed, mix, seed_device, splitmix64


def _groups(tp: int = 0, cp: int = 0) -> ProcessGroups:
    return replace(single_process(), tp=Group((0, 1), tp, 2, None), cp=Group((0, 1), cp, 2, None))


def test_splitmix_gives_the_published_sequence() -> None:
    """First outputs of the reference generator started at 1234567: state advances by the golden ratio."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    outputs = [splitmix64((1234567 + i * golden) & mask) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_order_and_every_value_count() -> None:
    assert len({mix((1, 2)), mix((2, 1)), mix((1, 2, 0)), mix((1, -2)), mix((1,))}) == 5


def test_every_argument_counts() -> None:
    base = (7, 3, "attention", _groups())
    seeds = [
        dropout_seed(*base, split=True),
        dropout_seed(8, *base[1:], split=True),
        dropout_seed(7, 4, *base[2:], split=True),
        dropout_seed(7, 3, "mlp_output", _groups(), split=True),
        dropout_seed(7, 3, "attention", _groups(tp=1), split=True),
        dropout_seed(7, 3, "attention", _groups(cp=1), split=True),
        dropout_seed(*base, split=False),
    ]
    assert len(set(seeds)) == len(seeds)


def test_replicated_tensors_are_dropped_alike_on_all_tensor_parallel_ranks() -> None:
    one, other = (dropout_seed(7, 3, "mlp_output", _groups(tp=rank), split=False) for rank in range(2))
    assert one == other


def test_a_seeded_device_repeats_itself() -> None:
    device, draws = torch.device("cpu"), []
    for seed in (1 << 63, 5, 1 << 63):
        seed_device(device, seed)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
