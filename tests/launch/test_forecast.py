"""The plan of a dry run."""

from __future__ import annotations

import re

import pytest

from megatron.launch.__main__ import main

_RUN = (
    *("--preset", "llama2-7b", "--seq-length", "4096", "--micro-batch-size", "1", "--global-batch-size", "64"),
    *("--lr", "1e-4", "--train-iters", "10", "--mock-data", "--bf16", "--nproc-per-node", "8"),
)


@pytest.fixture
def plan(capsys):
    """The lines about memory and time of a dry run."""

    def call(*flags):
        assert main([*_RUN, "--device", "cpu", "--dry-run", *flags], {}) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[-2] == "== command"
        return out.partition("== plan\n")[2].partition("\n\n")[0].splitlines()

    return call


def test_a_layout_that_fits(plan):
    machine, layout, memory, time = plan("--machine", "h100", "--zero-stage", "1", "--recompute-granularity", "full")
    assert machine == "8 ranks: NVIDIA H100 SXM, 8 per node, NDR InfiniBand"
    assert layout == "layout: TP 1, PP 1, DP 8, native stage 1, micro-batch 1, all layers recomputed"
    assert re.match(r"memory: fits, [\d.]+ of 74.4 GiB on the fullest rank: .*weights 12.6, ", memory)
    assert re.match(r"time: [\d.]+ s for a step of 0.26 M tokens, [\d,]+ tokens/s per rank, MFU \d+%", time)


def test_a_layout_that_does_not_fit(plan):
    assert plan("--machine", "trn1")[2].startswith("memory: DOES NOT FIT, ")


def test_a_device_without_figures_has_no_plan(plan):
    assert plan() == []


def test_an_unknown_machine_is_refused(capsys):
    assert main([*_RUN, "--device", "cpu", "--dry-run", "--machine", "h1000"], {}) == 2
    assert "--machine h1000: no such machine; the nearest is h100" in capsys.readouterr().err
