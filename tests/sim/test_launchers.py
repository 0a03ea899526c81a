"""The vendors' LLaMA launch scripts on their simulated devices: TP2 x PP2, and sharded data parallelism.

Each run has the losses and gradient norms of one CPU process, calls the vendor's fused kernels, and runs nothing on the
host without a word.
"""

from __future__ import annotations

import functools

import pytest

from tests.parity import FLOAT32_TOLERANCE, difference
from tests.sim import launchers, snapshot
from tests.sim.launchers import STEPS, launch, write_data
from tests.sim.run import need

pytestmark = pytest.mark.slow

RUNS = {
    "hpu": {"TP2 PP2": "GAUDI_LLAMA", "DP2 ZeRO": "GAUDI_LLAMA"},
    "npu": {"TP2 PP2": "ASCEND_PTD", "DP2 ZeRO": "ASCEND_ZERO"},
    "neuron": {"TP2 PP2": "TRAINIUM_LLAMA", "DP2 ZeRO": "TRAINIUM_LLAMA"},
}
"""Device -> layout -> script of `tests.sim.launchers`."""
FUSED = {
    "hpu": {"rms_norm", "rms_norm_backward", "rotary_pos_embedding", "rotary_pos_embedding_backward"},
    "npu": {"npu_fusion_attention", "npu_fusion_attention_grad", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"},
    "neuron": set(),  # its compiler fuses torch's operators
}
"""Kernels of the vendor that every run of a device must call."""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The run of a script in one process on the CPU, which several layouts are compared with."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("cpu")
        write_data(folder)
        return launch(getattr(launchers, name), folder / "run", "one", device=None)

    return run


@pytest.mark.parametrize(("device", "layout"), [(device, layout) for device in RUNS for layout in RUNS[device]])
def test_launcher_on_the_simulated_device_equals_the_cpus(device, layout, tmp_path, on_cpu):
    need(device)
    name = RUNS[device][layout]
    write_data(tmp_path)
    run = launch(getattr(launchers, name), tmp_path / "device", layout, device=device)
    cpu = on_cpu(name)
    assert f"device: {device}, " in run.output and "(simulated)" in run.output
    assert len(run.records) == len(cpu.records) == STEPS
    for name in ("lm_loss", "grad_norm"):
        found, expected = ([record[name] for record in one.records] for one in (run, cpu))
        assert difference(found, expected) <= FLOAT32_TOLERANCE, name
    print(device, layout, *(line for line in run.output.splitlines() if line.startswith("op ")), sep="\n")
    assert len(run.counts) == (4 if layout == "TP2 PP2" else 2)
    for rank, counts in enumerate(run.counts):
        print(f"rank {rank} called {counts.vendor()} and {sorted(counts.collectives)}")  # `pytest -s` shows it
        assert set(counts.vendor()) >= FUSED[device]
        if device != "neuron":  # its vendor publishes no table of operators
            assert sorted(counts.torch_operators() - set(snapshot.read(device)["native"])) == []
