"""Rank arithmetic against Megatron's order, written as nested loops."""

from __future__ import annotations

import itertools

import pytest

from megatron.mpu.topology import AXES, Place, Topology

LARGEST_WORLD = 64


def _all_topologies() -> list[Topology]:
    sizes = range(1, LARGEST_WORLD + 1)
    return [
        Topology(world, tp, cp, pp)
        for world in sizes
        for tp in sizes
        if world % tp == 0
        for cp in sizes
        if world % (tp * cp) == 0
        for pp in sizes
        if world % (tp * cp * pp) == 0
    ]


def test_every_rank_of_every_topology_has_megatrons_place() -> None:
    for topology in _all_topologies():
        grid = itertools.product(
            range(topology.pp), range(topology.dp), range(topology.cp), range(topology.tp)
        )  # last index fastest
        for rank, (pp, dp, cp, tp) in enumerate(grid):
            place = Place(tp=tp, cp=cp, dp=dp, pp=pp)
            assert topology.place(rank) == place
            assert topology.rank(place) == rank


def test_groups_partition_the_world_and_differ_only_along_their_axis() -> None:
    for topology in _all_topologies():
        if topology.world_size not in (12, 16, 24, 64):
            continue
        for axes in (("tp",), ("cp",), ("dp",), ("pp",), ("cp", "dp"), ("tp", "pp"), AXES):
            groups = topology.groups(*axes)
            assert sorted(itertools.chain(*groups)) == list(range(topology.world_size))
            for group in groups:
                assert len(group) == topology.size(*axes)
                assert group == sorted(group)
                places = [topology.place(rank) for rank in group]
                for axis in set(AXES) - set(axes):
                    assert len({getattr(place, axis) for place in places}) == 1


def test_the_example_of_megatrons_documentation() -> None:
    """16 devices, tensor parallel 2, pipeline parallel 4: the groups listed in initialize_model_parallel."""
    topology = Topology(16, tp=2, pp=4)
    assert topology.dp == 2
    assert topology.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert topology.groups("tp") == [[rank, rank + 1] for rank in range(0, 16, 2)]
    assert topology.groups("pp") == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


def test_expert_groups_are_consecutive_ranks_of_the_data_plane() -> None:
    topology = Topology(16, tp=2, pp=2, ep=2)
    assert topology.groups("ep") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 8, "tp": 3}, "8 ranks cannot be divided.*--tensor-model-parallel-size"),
        ({"world_size": 8, "tp": 0}, "--tensor-model-parallel-size is 0"),
        ({"world_size": 0}, "world size is 0"),
        ({"world_size": 8, "ep": 3}, "--expert-model-parallel-size is 3"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(**sizes)


def test_unknown_ranks_and_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 4 is not in a world of 4"):
        Topology(4).place(4)
    with pytest.raises(ValueError, match="'sp'"):
        Topology(4).groups("sp")
