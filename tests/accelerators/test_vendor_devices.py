"""Gaudi, Ascend and Trainium: what they say without their software, and what they do on the simulated devices."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch

from megatron import accelerators
from megatron.accelerators import UnavailableDeviceError, deepspeed_environment
from megatron.accelerators.hpu import card_peak_flops
from megatron.accelerators.neuron import device_peak_flops
from megatron.accelerators.vendor import check_local_rank, import_problem
from tests.sim.build import Device
from tests.sim.run import BACKEND, DEVICES, counted, run_on_sim

PACKAGES = {"hpu": "habana_frameworks", "npu": "torch_npu", "neuron": "torch_neuronx", "neuron_xla": "torch_xla"}


@pytest.mark.parametrize("name", PACKAGES)
def test_without_its_software_a_device_is_refused_with_the_reason(name):
    device = accelerators.load(name)
    if device.is_available():
        pytest.skip(f"{name} is available on this machine")
    assert device.unavailable_reason() == f"python package {PACKAGES[name]} is not installed"
    assert device.device_count() == 0
    with pytest.raises(UnavailableDeviceError, match=f"--device {name}: python package {PACKAGES[name]} is not"):
        accelerators.select(name)


@pytest.mark.parametrize("name", PACKAGES)
def test_no_vendor_package_is_loaded_by_torch_itself(name):
    variables = {variable.name: variable.value for variable in accelerators.load(name).environment}
    assert variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


@pytest.mark.parametrize(("version", "lazy"), [("2.6.0+git21045cd", "1"), ("2.13.0+cpu", "0"), ("2.13.0", "0")])
def test_gaudi_is_lazy_where_torch_can_be(monkeypatch, version, lazy):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    variables = {variable.name: variable for variable in accelerators.load("hpu").environment}
    assert variables["PT_HPU_LAZY_MODE"].value == lazy
    assert variables["PT_HPU_LAZY_MODE"].why


@pytest.mark.parametrize(("name", "expected"), [("hpu", "hpu"), ("npu", "npu"), ("neuron", None), ("neuron_xla", None)])
def test_deepspeed_knows_some_of_them(name, expected):
    device = accelerators.load(name)
    if expected is None:
        with pytest.raises(UnavailableDeviceError, match="run without --deepspeed"):
            deepspeed_environment(device, {})
    else:
        assert deepspeed_environment(device, {})["DS_ACCELERATOR"] == expected


def test_a_package_that_breaks_while_it_is_imported_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_vendor.py").write_text("raise OSError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    problem = import_problem("broken_vendor")
    assert problem == (
        "python package broken_vendor does not load here: OSError: libhccl.so: cannot open shared object file"
    )
    assert import_problem("json.decoder") == ""
    assert import_problem("no_such_vendor.torch") == "python package no_such_vendor is not installed"


def test_local_rank_without_a_device():
    check_local_rank(7, 8, "NPU", "ASCEND_RT_VISIBLE_DEVICES")
    with pytest.raises(ValueError, match=r"local rank 8 has no NPU: 8 visible.*ASCEND_RT_VISIBLE_DEVICES"):
        check_local_rank(8, 8, "NPU", "ASCEND_RT_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("card", "dtype", "flops"),
    [
        ("GAUDI2", torch.bfloat16, 432e12),
        ("GAUDI3", torch.bfloat16, 1835e12),
        ("Gaudi 3", torch.bfloat16, 1835e12),
        ("GAUDI", torch.bfloat16, 60e12),
        ("GAUDI2", torch.float32, None),
        ("UNHEARD OF", torch.bfloat16, None),
    ],
)
def test_peak_of_gaudi_cards(card, dtype, flops):
    assert card_peak_flops(card, dtype) == flops


def test_peak_of_trainium_cores():
    assert device_peak_flops("trn2", torch.bfloat16, 2) == pytest.approx(166.75e12)
    assert device_peak_flops("trn3.48xlarge", torch.float32, 1) == pytest.approx(183e12 / 8)
    assert device_peak_flops("trn2", torch.int8, 2) is None
    assert device_peak_flops("inf9", torch.bfloat16, 2) is None


def _everything(name: Device) -> dict[str, Any]:
    device = accelerators.select("auto")
    assert device == accelerators.select(name)
    place = device.set_device(0)
    device.manual_seed(3)
    first = torch.rand(4, device=place)
    device.manual_seed(3)
    assert torch.equal(torch.rand(4, device=place), first)
    before = device.memory_stats()
    block = torch.ones(2**20, device=place)
    after = device.memory_stats()
    assert after.allocated - before.allocated == block.nbytes
    assert after.max_allocated >= after.allocated and after.max_reserved >= after.reserved >= after.allocated
    del block
    device.reset_peak_memory()
    assert device.memory_stats().max_allocated < after.allocated
    device.synchronize()
    assert torch.float64 not in device.capabilities.dtypes
    with pytest.raises(ValueError, match="local rank 99"):
        device.set_device(99)
    return {
        "device": str(place),
        "description": device.device_description(),
        "count": device.device_count(),
        "backend": device.collective_backend,
        "peak": device.peak_flops(torch.bfloat16),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_device_layer_on_the_simulated_device(name):
    (found,) = run_on_sim(name, _everything, name)
    assert found["device"] == f"{name}:0"
    assert found["backend"] == BACKEND[name]
    assert found["count"] == 8 and found["description"].startswith("8 ")
    assert found["peak"] == {"hpu": 432e12, "npu": None, "neuron": pytest.approx(166.75e12)}[name]


def _place_of_rank(name: Device) -> str:
    import os

    return str(accelerators.select(name).set_device(int(os.environ["LOCAL_RANK"])))


@pytest.mark.slow
def test_a_gaudi_process_calls_its_card_number_0():
    assert run_on_sim("hpu", _place_of_rank, "hpu", world_size=2) == ["hpu:0", "hpu:0"]
    assert run_on_sim("npu", _place_of_rank, "npu", world_size=2) == ["npu:0", "npu:1"]


def _boundary() -> tuple[str, dict[str, int]]:
    device = accelerators.select("hpu")
    with counted("hpu") as counts:
        device.end_of_micro_step()
        events = counts().events
    return device.device_description(), events


@pytest.mark.slow
@pytest.mark.parametrize(("lazy", "marks"), [("0", {}), ("1", {"mark_step": 1})])
def test_gaudis_graph_is_cut_once_per_micro_step_in_lazy_mode(lazy, marks):
    ((description, events),) = run_on_sim("hpu", _boundary, env={"PT_HPU_LAZY_MODE": lazy})
    assert events == marks
    assert description.endswith("lazy mode" if marks else "eager mode")
