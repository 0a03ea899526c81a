"""The PyTorch/XLA device against a stand-in with the published names of torch_xla, which itself is for torch 2.9.

What is tested is that each call exists under that name, goes through, and is made when it should be; nothing more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron import accelerators
from tests.support import run_ranks

STAND_IN = {
    "torch_xla/__init__.py": """
import torch
SYNCS = []
def device(): return torch.device("cpu")
def sync(wait=False): SYNCS.append(wait)
""",
    "torch_xla/runtime.py": """
import os
def device_type(): return os.environ.get("PJRT_DEVICE", "CPU")
def addressable_device_count(): return 2
def world_size(): return int(os.environ.get("STAND_IN_WORLD_SIZE", "1"))
""",
    "torch_xla/core/__init__.py": "",
    "torch_xla/core/xla_model.py": """
STATE = [0]
def set_rng_state(seed): STATE[0] = seed
def get_rng_state(): return STATE[0]
def get_memory_info(device): return {"bytes_used": 5, "bytes_limit": 100, "peak_bytes_used": 7}
""",
}


def _use(folder: str) -> list[bool]:
    sys.path.insert(0, folder)
    device = accelerators.select("neuron_xla")
    device.set_device(0)
    device.manual_seed(2**40 + 3)
    state = device.rng_state()
    device.manual_seed(1)
    device.set_rng_state(state)
    assert torch.equal(device.rng_state(), state) and state.dtype == torch.uint8
    stats = device.memory_stats()
    assert (stats.allocated, stats.max_allocated, stats.reserved, stats.max_reserved) == (5, 7, 100, 100)
    assert device.capabilities.step_boundary_per_micro_step
    device.end_of_micro_step()
    device.synchronize()
    assert device.peak_flops(torch.bfloat16) == 95e12
    assert device.device_description().startswith("2 cores")
    import torch_xla

    return torch_xla.SYNCS


def _reason(folder: str) -> str:
    sys.path.insert(0, folder)
    return accelerators.load("neuron_xla").unavailable_reason()


def _other_world(folder: str) -> str:
    sys.path.insert(0, folder)
    with pytest.raises(ValueError) as refusal:
        accelerators.select("neuron_xla").set_device(0)
    return str(refusal.value)


def _several(folder: str) -> str:
    sys.path.insert(0, folder)
    with pytest.raises(accelerators.UnavailableDeviceError) as refusal:
        accelerators.select("neuron_xla").set_device(0)
    return str(refusal.value)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return str(tmp_path)


def test_the_graph_is_cut_after_every_micro_step_and_waited_for_when_asked(folder):
    assert run_ranks(1, _use, folder, env={"PJRT_DEVICE": "NEURON"}, init=False) == [[False, True]]


def test_other_hardware_is_refused(folder):
    assert run_ranks(1, _reason, folder, env={"PJRT_DEVICE": "CPU"}, init=False) == [
        "torch_xla runs on CPU, not on NEURON (PJRT_DEVICE)"
    ]


def test_ranks_that_torch_xla_does_not_count_are_refused(folder):
    env = {"PJRT_DEVICE": "NEURON", "STAND_IN_WORLD_SIZE": "4"}
    (message,) = run_ranks(1, _other_world, folder, env=env, init=False)
    assert "the launcher started 1 ranks, torch_xla counts 4" in message


def test_several_processes_are_refused(folder):
    for message in run_ranks(2, _several, folder, env={"PJRT_DEVICE": "NEURON"}, init=False):
        assert "trains on one core, and there are 2 processes" in message and "--device neuron " in message
