"""What a plan looks like."""

from __future__ import annotations

import json

import pytest

from megatron.planner import report
from megatron.planner.chart import draw
from megatron.planner.machines import MACHINES
from megatron.planner.plan import Plan, make_plan
from megatron.planner.request import read_request
from megatron.training.report import ReportError

FLAGS = (
    "--preset llama2-70b --bf16 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --sequence-parallel "
    "--use-distributed-optimizer"
)


@pytest.fixture(scope="module")
def planned():
    request = read_request(FLAGS.split(), 32)
    plan = make_plan(request, MACHINES["gaudi2"])
    assert isinstance(plan, Plan)
    return plan, request


def test_columns_are_aligned():
    lines = report.table("lr", ["name", "n"], [["a", "1"], ["long name", "1234"]])
    assert lines == ["  name          n", "  a             1", "  long name  1234"]


def test_text(planned):
    plan, request = planned
    text = "\n".join(report.plan_lines(plan, request, rank=17))
    assert "layout: TP 8 SP, PP 4 1f1b, DP 1, native stage 1, micro-batch 1, no recomputation" in text
    assert "rank 17 (tp 1, cp 0, dp 0, pp 2): 2,139,422,720 parameters: layers 40-59" in text
    assert "fits: " in text
    assert "the published run on gaudi2 reaches" in text


def test_json_holds_the_same(planned):
    plan, _ = planned
    document = json.loads(json.dumps(report.as_json(plan, rank=17)))
    assert document["fits"] is plan.fits
    assert document["needed_bytes"] == max(place["peak_bytes"] for place in document["memory"])
    assert document["speed"]["step_seconds"] == pytest.approx(sum(document["speed"]["seconds"].values()))
    assert {traffic["axis"] for traffic in document["traffic"]} == {"tensor", "pipeline"}


def test_chart(planned, tmp_path):
    plan, request = planned
    draw(plan, request, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_chart_of_a_long_pipeline_in_svg(tmp_path):
    flags = "--preset llama2-70b --bf16 --pipeline-model-parallel-size 40 --micro-batch-size 1"
    request = read_request(flags.split(), 40)
    plan = make_plan(request, MACHINES["h100"])
    draw(plan, request, tmp_path / "memory.svg")
    text = (tmp_path / "memory.svg").read_text()
    assert text.count("stage ") <= 2 * 16  # labels, and what else speaks of them


def test_chart_without_a_place(planned, tmp_path):
    plan, request = planned
    with pytest.raises(ReportError, match="--chart"):
        draw(plan, request, tmp_path / "missing" / "memory.png")
