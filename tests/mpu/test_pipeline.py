from __future__ import annotations

import pytest

from megatron.mpu.pipeline import Placement, StageLayout


@pytest.mark.parametrize("placement", ["loop", "vee"])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_every_stage_and_layer_has_one_place(ranks: int, chunks: int, placement: Placement) -> None:
    layout = StageLayout(ranks, tuple(1 + stage % 3 for stage in range(ranks * chunks)), placement)
    stages = [stage for rank in range(ranks) for stage in layout.stages_of(rank)]
    assert sorted(stages) == list(range(layout.stages))
    for rank in range(ranks):
        assert list(layout.stages_of(rank)) == sorted(layout.stages_of(rank))
        assert {layout.rank_of(stage) for stage in layout.stages_of(rank)} == {rank}
    layers = [layer for stage in range(layout.stages) for layer in layout.layers_of(stage)]
    assert layers == list(range(sum(layout.layers)))


def test_loop_goes_round_and_vee_there_and_back() -> None:
    loop, vee = StageLayout(2, (1,) * 6), StageLayout(2, (1,) * 6, "vee")
    assert [loop.rank_of(stage) for stage in range(6)] == [0, 1, 0, 1, 0, 1]
    assert [vee.rank_of(stage) for stage in range(6)] == [0, 1, 1, 0, 0, 1]
    uneven = StageLayout(2, (0, 2, 3, 1))
    assert [list(uneven.layers_of(stage)) for stage in uneven.stages_of(0)] == [[], [2, 3, 4]]


def test_without_a_pipeline_one_stage_is_first_and_last() -> None:
    layout = StageLayout(1, (5,))
    assert (layout.last, layout.chunks, layout.layers_of(0)) == (0, 1, range(5))


@pytest.mark.parametrize("layers", [(), (1, 1, 1)])
def test_stages_are_dealt_out_evenly(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be dealt out to 2 pipeline ranks"):
        StageLayout(2, layers)
