"""The vendors' scripts: every one has a kept launch, one per vendor runs dry for real, and says what it needs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron.training.compare import compare, read_curve
from tests.launch.cases import CASES
from tests.launch.recorded import ROOT

_ROUNDING = 1e-5
"""Relative error of float32 losses whose sums have another order."""
_SHARED = {"cpu/run_llama.sh", "gpu/run_llama.sh"}
"""Tried by test_examples.py."""


def _run(script, *flags, **variables):
    environ = {**os.environ, "MEGATRON_PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(ROOT / "examples" / script), *flags],
        cwd="/",
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_every_script_has_a_kept_launch():
    scripts = {path.relative_to(ROOT / "examples").as_posix() for path in (ROOT / "examples").glob("*/*.sh")}
    assert scripts == {case.script for case in CASES.values()} | _SHARED


@pytest.mark.parametrize("name", ["hpu_llama2_70b_32", "npu_pretrain_65b_ptd_32p", "neuron_llama2_70b_slurm"])
def test_script_runs_dry_from_any_folder(name):
    done = _run(CASES[name].script, "--dry-run", **CASES[name].variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== settings" in done.stdout and "== command" in done.stdout


@pytest.mark.slow
def test_gaudi_script_trains_on_a_cpu_when_told_to(tmp_path):
    small = {"HL_GBS": "4", "HL_SEQ_LEN": "64", "HL_TRAIN_ITERS": "3", "HL_LOG_INTERVAL": "1", "HL_EVAL_ITERS": "1"}
    shape = ("--preset", "llama-tiny", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511")
    layouts = {"one": {"HL_TP": "1", "HL_PP": "1"}, "two": {"HL_TP": "1", "HL_PP": "2"}}
    for name, layout in layouts.items():
        where = {"DEVICE": "cpu", "PRECISION": "fp32", "HL_DP": "1", "HL_RESULTS_DIR": str(tmp_path / name)}
        done = _run("hpu/run_llama.sh", *shape, "--lr-warmup-iters", "1", **small, **layout, **where)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert (tmp_path / name / "checkpoints").is_dir()
    curves = [read_curve(tmp_path / name / "metrics.jsonl") for name in layouts]
    assert compare(*curves, threshold=_ROUNDING).passed


@pytest.mark.slow
def test_refusal_of_the_trainer_is_what_the_user_sees():
    done = _run("hpu/run_llama.sh", "--dry-run", HL_MICRO_BATCH="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --") and "must be a multiple of 6 = --micro-batch-size 3" in done.stderr


def test_tuning_needs_weights():
    done = _run("npu/tune_llama_ptd_13B.sh", "--dry-run", CHECKPOINT="")
    assert done.returncode != 0 and "CHECKPOINT: set it to the folder" in done.stderr
