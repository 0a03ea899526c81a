"""Models on the simulated devices: the loss and gradients of the CPU, from the fused kernels, without detours.

A detour is what makes training slow without a word: a copy of a tensor between host and device, a value that the host
waits for, or an operator that the device has no kernel for and hands to the host. The first two are counted by the
simulated device. For the third, the names of the operators that ran are compared with the vendor's own table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron import accelerators
from megatron.config.architecture import Architecture
from megatron.model.gpt import GPT, ModelInputs
from megatron.model.weights import initialise_parameters
from megatron.mpu.groups import single_process
from megatron.ops import build_table, reference_ops
from tests.model.helpers import FAMILIES, SEED, perturb, tokens_of
from tests.sim import snapshot
from tests.sim.build import Device
from tests.sim.run import DEVICES, Counts, counted, run_on_sim

pytestmark = pytest.mark.slow

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Relative to the largest gradient: the tolerance of the kernels, and what bfloat16 adds up to over two layers."""

LLAMA = replace(FAMILIES["llama"], num_kv_heads=2)
ARCHITECTURES: dict[str, Architecture] = {**FAMILIES, "llama": LLAMA}
INPUTS = {
    "plain": ModelInputs(),
    "documents": ModelInputs(
        position_ids=torch.tensor([[*range(10), *range(6)]] * 3), document_ids=torch.tensor([[0] * 10 + [1] * 6] * 3)
    ),
}
CASES = [("llama", "plain"), ("llama", "documents"), ("bloom", "plain"), ("gpt", "plain"), ("variants", "plain")]
FUSED: dict[Device, dict[str, int]] = {
    # Two layers: two norms, two rotations and one attention each, and the final norm.
    "hpu": {
        **{"rms_norm": 5, "rms_norm_backward": 5, "sdpa_fwd": 2, "sdpa_bwd": 2},
        **{"rotary_pos_embedding": 4, "rotary_pos_embedding_backward": 4},
    },
    "npu": {
        **{"npu_rms_norm": 5, "npu_rms_norm_backward": 5, "npu_rotary_mul": 4, "npu_rotary_mul_backward": 4},
        **{"npu_fusion_attention": 2, "npu_fusion_attention_grad": 2, "npu_swiglu": 2, "npu_swiglu_backward": 2},
    },
    "neuron": {},
}


def _model(arch: Architecture, ops: Any, device: torch.device, dtype: torch.dtype) -> GPT:
    groups = single_process()
    on_host = GPT(arch, ops=ops, groups=groups, dtype=dtype)
    initialise_parameters(on_host, arch, groups, SEED)
    perturb(on_host, groups)
    model = GPT(arch, ops=ops, groups=groups, device=device, dtype=dtype)
    model.load_state_dict(on_host.state_dict())
    return model.train()


def _inputs(kind: str, device: torch.device) -> ModelInputs:
    given = INPUTS[kind]
    if given.document_ids is None:
        return given
    return ModelInputs(position_ids=given.position_ids.to(device), document_ids=given.document_ids.to(device))


def _pass(model: GPT, ops: Any, arch: Architecture, inputs: ModelInputs, tokens: Any) -> torch.Tensor:
    """Forward and backward; the mean loss."""
    logits = model(tokens[0], inputs)[..., : arch.vocab_size]
    loss = ops.cross_entropy(logits, tokens[1]).mean()
    loss.backward()
    return loss.detach()


def _run(device: Device, family: str, kind: str, dtype: torch.dtype) -> tuple[Any, Counts]:
    """Loss and gradients, and what happened in a second forward and backward."""
    accelerator = accelerators.select(device)
    place, arch = accelerator.set_device(0), ARCHITECTURES[family]
    ops, _ = build_table(accelerator, {})
    model, inputs = _model(arch, ops, place, dtype), _inputs(kind, place)
    tokens = [ids.to(place) for ids in tokens_of(arch)]
    tokens[1] = tokens[1].t().contiguous()
    loss = _pass(model, ops, arch, inputs, tokens)
    gradients = {name: p.grad.float().cpu().numpy() for name, p in model.named_parameters()}
    model.zero_grad()
    _pass(model, ops, arch, inputs, tokens)  # the first accumulation of a gradient differs from later ones
    model.zero_grad()
    with counted(device) as counts:
        _pass(model, ops, arch, inputs, tokens)
        found = counts()
    return (loss.float().cpu().item(), gradients), found


def _expected(family: str, kind: str, dtype: torch.dtype) -> tuple[float, dict[str, np.ndarray]]:
    arch, ops = ARCHITECTURES[family], reference_ops()
    model = _model(arch, ops, torch.device("cpu"), dtype)
    tokens, labels = tokens_of(arch)
    loss = _pass(model, ops, arch, _inputs(kind, torch.device("cpu")), (tokens, labels.t()))
    return loss.float().item(), {name: p.grad.float().numpy() for name, p in model.named_parameters()}


def _check_numbers(found: Any, family: str, kind: str, dtype: torch.dtype) -> None:
    loss, gradients = _expected(family, kind, dtype)
    assert found[0] == pytest.approx(loss, rel=TOLERANCE[dtype])
    assert found[1].keys() == gradients.keys()
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=0, atol=TOLERANCE[dtype] * largest, err_msg=name)


def _check_no_detour(device: Device, counts: Counts) -> None:
    assert (counts.to_device, counts.to_host, counts.host_reads) == (0, 0, {})
    assert counts.new_signatures == 0, "a second pass must not compile anything"
    if device != "neuron":  # its vendor publishes no table
        assert sorted(counts.torch_operators() - set(snapshot.read(device)["native"])) == []


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_model_equals_the_cpus_without_a_detour_by_the_host(device, family, kind):
    ((numbers, counts),) = run_on_sim(device, _run, device, family, kind, torch.float32)
    _check_numbers(numbers, family, kind, torch.float32)
    _check_no_detour(device, counts)
    if family == "llama":  # with a position table per sequence, some devices rotate the sequences one by one
        assert counts.vendor().keys() == FUSED[device].keys()
        assert kind != "plain" or counts.vendor() == FUSED[device]


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_llama_stays_close(device):
    ((numbers, counts),) = run_on_sim(device, _run, device, "llama", "plain", torch.bfloat16)
    _check_numbers(numbers, "llama", "plain", torch.bfloat16)
    _check_no_detour(device, counts)
    assert counts.vendor() == FUSED[device]


def _detours(device: Device) -> Counts:
    x = torch.ones(4, 4, device=device)
    with counted(device) as counts:
        torch.special.bessel_j0(x)
        if x.sum().item() > 0:
            x.cpu()
        return counts()


@pytest.mark.parametrize("device", ["hpu", "npu"])
def test_a_detour_is_noticed(device):
    (counts,) = run_on_sim(device, _detours, device)
    with pytest.raises(AssertionError):
        _check_no_detour(device, counts)
    assert counts.to_host == 1 and counts.host_reads
    assert "special_bessel_j0" in counts.torch_operators() - set(snapshot.read(device)["native"])
