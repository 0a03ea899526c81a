"""From flags to pipeline stages."""

from __future__ import annotations

import pytest

from megatron.config.parser import ConfigError
from megatron.config.pipeline import PipelineError, read_layout
from tests.config.commands import config

PP4 = ("--pipeline-model-parallel-size", "4")


@pytest.mark.parametrize(
    ("flags", "schedule", "layers"),
    [
        ("", "1f1b", (2, 2, 2, 2)),
        ("--pipeline-schedule gpipe", "gpipe", (2, 2, 2, 2)),
        ("--enable-zbh1-pipeline", "zero-bubble", (2, 2, 2, 2)),
        ("--num-virtual-stages-per-pipeline-rank 2", "interleaved", (1,) * 8),
        ("--num-layers-per-virtual-pipeline-stage 1", "interleaved", (1,) * 8),
        ("--num-layers-per-virtual-pipeline-stage 2", "1f1b", (2, 2, 2, 2)),
        ("--pipeline-schedule zbv", "zbv", (1,) * 8),
        ("--pipeline-schedule zero-bubble --num-virtual-stages-per-pipeline-rank 2", "zero-bubble", (1,) * 8),
        ("--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3", "1f1b", (1, 2, 2, 3)),
        ("--decoder-last-pipeline-num-layers 2", "1f1b", (2, 2, 2, 2)),
        ("--standalone-embedding-stage --decoder-last-pipeline-num-layers 4", "1f1b", (0, 2, 2, 4)),
        (
            "--num-virtual-stages-per-pipeline-rank 2 --num-layers 10 --decoder-first-pipeline-num-layers 4",
            "interleaved",
            (2, 1, 1, 1, 2, 1, 1, 1),
        ),
        ("--account-for-embedding-in-pipeline-split --num-layers 7", "1f1b", (1, 2, 2, 2)),
        (
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --num-layers 14",
            "1f1b",
            (3, 4, 4, 3),
        ),
        ("--pipeline-model-parallel-layout Et*3|(t|)*2,t*3L", "1f1b", (3, 1, 1, 3)),
        ("--pipeline-model-parallel-layout Et|(t|)*6,tL", "interleaved", (1,) * 8),
        ("--pipeline-model-parallel-layout E|t*2|(t|)*4tt|L --pipeline-schedule zbv", "zbv", (0, 2, 1, 1, 1, 1, 2, 0)),
    ],
)
def test_stages(flags: str, schedule: str, layers: tuple[int, ...]) -> None:
    parallel = config("--num-layers", "8", *PP4, *flags.split(), world_size=4).parallel
    assert (parallel.pipeline_schedule, parallel.pipeline_stage_layers) == (schedule, layers)
    assert parallel.virtual_pipeline_model_parallel_size == len(layers) // 4


@pytest.mark.parametrize(
    ("text", "ranks", "layers"),
    [
        ("Et|t|t|tL", 4, (1, 1, 1, 1)),
        ("E|t*3|L", 3, (0, 3, 0)),
        ("E t*2, | (t|)*2 ttL", 4, (2, 1, 1, 2)),
        ("Et*3|(tt|)*29,tL", 31, (3, *(2,) * 29, 1)),
        ("E(t(t|)*2)*2L", 5, (2, 1, 2, 1, 0)),
        ("(Et|)t|tL", 3, (1, 1, 1)),
        # LLaMA 3.1 405B: 126 layers on 16 ranks, one less at both ends
        ("Et*7|(t*8|)*14t*7L", 16, (7, *(8,) * 14, 7)),
    ],
)
def test_layouts_in_megatrons_notation(text: str, ranks: int, layers: tuple[int, ...]) -> None:
    assert read_layout(text, ranks, sum(layers)) == layers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttL", "must be E, then t"),
        ("Etm|tL", "must be E, then t"),
        ("E(tt|tL", "must be E, then t"),
        ("Et*|tL", "must be E, then t"),
        ("Et||tL|", "must be E, then t"),
        ("Ett||ttL", "has 3 stages, 1 of them empty"),
        ("Et|t|tL", "has 3 stages, 0 of them empty"),
        ("Et|ttL", "has 3 layers, --num-layers is 4"),
    ],
)
def test_layouts_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(PipelineError, match=f"--pipeline-model-parallel-layout .*{words}"):
        read_layout(text, 2, 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-layers 9", "must be a multiple of the 4 pipeline stages"),
        ("--num-virtual-stages-per-pipeline-rank 3", "--num-layers 8: must be a multiple of the 12 pipeline stages"),
        ("--num-layers-per-virtual-pipeline-stage 3", "multiple of 12 = 3 x --pipeline-model-parallel-size"),
        (
            "--num-layers-per-virtual-pipeline-stage 1 --num-virtual-stages-per-pipeline-rank 2",
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank: give one of them",
        ),
        (
            "--num-layers-per-virtual-pipeline-stage 1 --decoder-last-pipeline-num-layers 2",
            "--num-layers-per-virtual-pipeline-stage 1: not with --decoder-last-pipeline-num-layers",
        ),
        (
            "--pipeline-model-parallel-layout Et*8L --decoder-last-pipeline-num-layers 2",
            "--pipeline-model-parallel-layout and --decoder-last-pipeline-num-layers: give one way to cut",
        ),
        (
            "--decoder-last-pipeline-num-layers 2 --account-for-loss-in-pipeline-split",
            "--decoder-last-pipeline-num-layers and --account-for-loss-in-pipeline-split: give one way to cut",
        ),
        ("--decoder-first-pipeline-num-layers 1", "7 layers are left, for 3 ranks"),
        ("--decoder-first-pipeline-num-layers 8", "0 layers are left, for 3 ranks"),
        ("--decoder-first-pipeline-num-layers 9", "-1 layers are left, for 3 ranks"),
        (
            "--decoder-first-pipeline-num-layers 5 --num-virtual-stages-per-pipeline-rank 2",
            "a pipeline rank has 5 layers, which cannot be cut into 2 equal stages",
        ),
        (
            "--standalone-embedding-stage --decoder-first-pipeline-num-layers 2",
            "--standalone-embedding-stage and --decoder-first-pipeline-num-layers: give one of them",
        ),
        ("--pipeline-schedule gpipe --num-virtual-stages-per-pipeline-rank 2", "a rank has one stage, not 2"),
        ("--pipeline-schedule interleaved", "give --num-virtual-stages-per-pipeline-rank"),
        ("--pipeline-schedule zbv --num-virtual-stages-per-pipeline-rank 1", "a rank has 2 stages, not 1"),
        ("--pipeline-schedule zbv --decoder-last-pipeline-num-layers 2", "give --pipeline-model-parallel-layout"),
    ],
)
def test_pipelines_that_are_refused(flags: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config("--num-layers", "8", *PP4, *flags.split(), world_size=4)
    assert any(words in problem for problem in caught.value.problems), caught.value.problems
