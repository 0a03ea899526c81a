"""Descriptions of machines."""

from __future__ import annotations

import pytest
import torch

from megatron.accelerators.cuda import card_peak_flops
from megatron.planner.machines import MACHINES, machine

ROUNDING = 1e-3
"""Relative: data sheets give three digits."""

_CARDS = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a800": "NVIDIA A800-SXM4-80GB",
}


@pytest.mark.parametrize("name", _CARDS)
def test_peaks_are_those_that_training_reports(name):
    found = MACHINES[name]
    assert found.peak == pytest.approx(card_peak_flops(_CARDS[name], torch.bfloat16, tf32=False), rel=ROUNDING)
    assert found.fp32_peak == pytest.approx(card_peak_flops(_CARDS[name], torch.float32, tf32=False), rel=2 * ROUNDING)


@pytest.mark.parametrize("name", MACHINES)
def test_every_figure_has_a_source(name):
    found = MACHINES[name]
    sources = " ".join(found.sources)
    for what in ("peak", "memory", "matmul", "attention", "between nodes", "knee"):
        assert what in sources or (what in ("peak", "memory") and "per chip" in sources) or "links" in sources
    assert found.usable < found.memory
    assert found.between <= found.inside


def test_unknown_machine():
    with pytest.raises(ValueError, match=r"--machine gaudi: no such machine; the nearest is gaudi\d"):
        machine("gaudi")
