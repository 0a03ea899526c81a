"""Curves for TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.accelerators.base import MemoryStats
from megatron.training.report import ReportError
from megatron.training.tensorboard import (
    Curves,
    Progress,
    TensorBoardWriter,
    WandbWriter,
    evaluation_scalars,
    interval_scalars,
    over_iterations,
    step_scalars,
    throughput_metrics,
)
from tests.training.samples import EVALUATION, REPORT, Result

AT = Progress(20, 640, 81920)


def points(curves: Curves, **more: Any) -> dict[str, float]:
    scalars = step_scalars(
        curves, AT, Result(loss=2.0, num_zeros=4), learning_rate=0.1, global_batch_size=32, world_size=8, **more
    )
    return {scalar.tag: scalar.value for scalar in scalars}


def test_tags_are_megatron_deepspeeds() -> None:
    always = points(Curves(learning_rate=False, loss_scale=False))
    assert always["lm-loss-training/lm loss"] == always["lm-loss-training/lm loss vs tokens"] == 2.0
    assert always["steps-vs-samples/y=steps,x=samples"] == 20
    assert always["num-zeros/num-zeros vs samples"] == 4
    memory = MemoryStats(allocated=1, max_allocated=2, reserved=3, max_reserved=4)
    everything = Curves(timers=True, batch_size=True, memory=True, world_size=True)
    added = set(points(everything, params_norm=3.0, memory=memory)) - set(always)
    assert {tag for tag in added if " vs " not in tag} == {
        "learning-rate/learning-rate",
        "batch-size/batch-size",
        "loss-scale/loss-scale",
        "world-size/world-size",
        "params-norm/params-norm",
        "mem-reserved-bytes",
        "mem-allocated-bytes",
        "mem-max-allocated-bytes",
    }


def test_points_lie_where_they_should() -> None:
    places = {scalar.tag: scalar.x for scalar in evaluation_scalars(Curves(validation_ppl=True), EVALUATION)}
    tag = "lm-loss-validation/lm loss validation"
    suffixes = {"": 20, " vs samples": 640, " vs tokens": 81920}
    assert places == {f"{tag}{ppl}{suffix}": x for ppl in ("", " ppl") for suffix, x in suffixes.items()}
    assert over_iterations(evaluation_scalars(Curves(), EVALUATION)) == {tag: 2.0}


def test_timers_are_those_of_the_slowest_rank() -> None:
    names, seconds = ["optimizer", "eval-time"], [[1.0, 0.0], [3.0, 0.0]]
    assert interval_scalars(Curves(), AT, 0.5, names, seconds) == []
    got = over_iterations(interval_scalars(Curves(timers=True), AT, 0.5, names, seconds, steps=2))
    assert got == {"iteration-time/iteration-time": 0.5, "optimizer-time": 1.5}


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    writer.write(evaluation_scalars(Curves(), EVALUATION))
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    (point,) = events.Scalars("lm-loss-validation/lm loss validation vs samples")
    assert (point.step, point.value) == (640, 2.0)


def test_throughput_metrics() -> None:
    got = throughput_metrics(REPORT, data_parallel_size=4, parameters=7_000_000_000)
    assert got["throughput/samples_per_sec_per_replica"] == pytest.approx(15.6)
    assert got["throughput/tokens_per_sec"] == pytest.approx(62.4 * 128)
    assert got["throughput/approx_params_in_billions"] == 7.0
    assert got["loss/lm loss"] == 2.5


WANDB = """
import json
class Run:
    def __init__(self, **settings): self.file = open(settings["dir"] + "/sent", "w"); self.say(settings)
    def say(self, what): self.file.write(json.dumps(what) + "\\n")
    def log(self, metrics, step): self.say([metrics, step])
    def finish(self): self.file.close()
init = Run
"""


def test_wandb_gets_project_metrics_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    writer = WandbWriter("llama", name="", directory=tmp_path, config={"lr": 0.1})
    writer.write({"loss/lm loss": 2.5}, 20)
    writer.close()
    monkeypatch.delitem(sys.modules, "wandb")
    settings, sent = (json.loads(line) for line in (tmp_path / "sent").read_text().splitlines())
    assert settings == {"project": "llama", "entity": None, "name": None, "dir": str(tmp_path), "config": {"lr": 0.1}}
    assert sent == [{"loss/lm loss": 2.5}, 20]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("wandb", lambda: WandbWriter("x", directory=None, config={})),
        ("tensorboard", lambda: TensorBoardWriter(Path("unused"))),
    ],
)
def test_a_missing_package_is_named(package: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ReportError, match=f"needs the package {package}: pip install {package}"):
        make()
