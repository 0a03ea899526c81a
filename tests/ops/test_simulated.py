"""Every kernel of Gaudi, Ascend and Trainium on the simulated device: within its tolerance, and without the host."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron import accelerators
from megatron.ops import implementations
from tests.sim import snapshot
from tests.sim.build import Device
from tests.sim.kernels import DTYPES, Finding, known, measure
from tests.sim.run import DEVICES, run_on_sim

pytestmark = pytest.mark.slow

COPIES = {
    ("hpu", "adamw", "fused"): "one tensor per group and step with its numbers, so that no kernel is compiled for them",
    ("neuron", "adamw", "compiled"): "the same",
}
"""Kernels that may copy to the device, and why."""
READS = {"grouped_matmul": "the host cuts the rows of the groups apart, of which it has to know how many there are"}
"""Operations that read numbers of the device once, and why."""


@functools.cache
def _found(device: Device) -> dict[tuple[str, str, torch.dtype], Finding]:
    return run_on_sim(device, measure, device)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "op", "name"), [(device, *pair) for device in DEVICES for pair in known(device)])
def test_kernel_is_right_and_stays_on_the_device(device, op, name, dtype):
    candidates = implementations(accelerators.load(device), op)
    tolerance = next(candidate.tolerance for candidate in candidates if candidate.name == name)
    if dtype not in tolerance:
        assert (op, name, dtype) not in _found(device)
        return
    finding = _found(device)[op, name, dtype]
    assert finding.error <= tolerance[dtype]
    for counts in finding.counts:
        assert (counts.to_host, counts.host_reads) == (int(op in READS), {})
        assert counts.to_device == 0 or (device, op, name) in COPIES
        if device != "neuron":  # its vendor publishes no table of operators
            assert sorted(counts.torch_operators() - set(snapshot.read(device)["native"])) == []


@pytest.mark.parametrize(
    ("device", "op", "name", "operators"),
    [
        ("hpu", "attention", "fused_sdpa", {"sdpa_fwd", "sdpa_bwd"}),
        ("hpu", "attention", "fused_sdpa_recompute", {"sdpa_recomp_fwd", "sdpa_recomp_bwd"}),
        ("hpu", "attention", "fused_sdpa_fast", {"sdpa_fwd", "sdpa_bwd"}),
        ("hpu", "attention", "fused_sdpa_fast_recompute", {"sdpa_recomp_fwd", "sdpa_recomp_bwd"}),
        ("hpu", "rms_norm", "fused", {"rms_norm", "rms_norm_backward"}),
        ("hpu", "rotary", "fused", {"rotary_pos_embedding", "rotary_pos_embedding_backward"}),
        ("hpu", "adamw", "fused", {"optimizer_adamw"}),
        ("npu", "attention", "fusion_attention", {"npu_fusion_attention", "npu_fusion_attention_grad"}),
        ("npu", "attention", "masked_softmax", {"npu_scaled_masked_softmax", "npu_scaled_masked_softmax_backward"}),
        ("npu", "rms_norm", "fused", {"npu_rms_norm", "npu_rms_norm_backward"}),
        ("npu", "rotary", "fused", {"npu_rotary_mul", "npu_rotary_mul_backward"}),
        ("npu", "swiglu", "fused", {"npu_swiglu", "npu_swiglu_backward"}),
    ],
)
def test_fused_kernel_calls_the_vendors_operators(device, op, name, operators):
    first = next(finding for key, finding in _found(device).items() if key[:2] == (op, name))
    assert first.counts[0].vendor().keys() == operators
