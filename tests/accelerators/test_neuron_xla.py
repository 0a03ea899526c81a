"""The PyTorch/XLA device against a stand-in with the published names of torch_xla, which itself is for torch 2.9.

What is tested is that each call exists under that name, goes through, and is made when it should be; nothing more.
"""

from __future__ import annotations

import os
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
def local_device_count(): return 2
def global_ordinal(): return int(os.environ.get("STAND_IN_RANK", os.environ.get("RANK", "0")))
def world_size(): return REPLICAS[0]
REPLICAS = [1]
""",
    "torch_xla/core/__init__.py": "",
    "torch_xla/core/xla_model.py": """
import os
from torch_xla import runtime
STATE = [0]
def set_replication(device, devices):
    runtime.REPLICAS[0] = int(os.environ.get("STAND_IN_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
def set_rng_state(seed): STATE[0] = seed
def get_memory_info(device): return {"bytes_used": 5, "bytes_limit": 100, "peak_bytes_used": 7}
""",
}


def _use(folder: str) -> list[bool]:
    sys.path.insert(0, folder)
    device = accelerators.select("neuron_xla")
    device.set_device(0)
    device.manual_seed(2**40 + 3)
    from torch_xla.core import xla_model

    assert xla_model.STATE == [2**40 + 3]
    stats = device.memory_stats()
    assert (stats.allocated, stats.max_allocated, stats.reserved, stats.max_reserved) == (5, 7, 100, 100)
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
    return str(accelerators.select("neuron_xla").set_device(int(os.environ["LOCAL_RANK"])))


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


@pytest.mark.parametrize("other", [{"STAND_IN_WORLD_SIZE": "4"}, {"STAND_IN_RANK": "3"}])
def test_ranks_that_torch_xla_numbers_otherwise_are_refused(folder, other):
    (message,) = run_ranks(1, _other_world, folder, env={"PJRT_DEVICE": "NEURON", **other}, init=False)
    found = f"torch_xla {other.get('STAND_IN_RANK', 0)} of {other.get('STAND_IN_WORLD_SIZE', 1)}"
    assert f"the launcher calls this rank 0 of 1, {found}" in message


def test_several_processes_have_a_core_each(folder):
    assert run_ranks(2, _several, folder, env={"PJRT_DEVICE": "NEURON"}, init=False) == ["cpu", "cpu"]
