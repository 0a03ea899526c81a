"""SIMULATION of torch_npu.contrib.transfer_to_npu: importing it sends `torch.cuda` calls to the simulated "npu".

Like the real one it makes `is_cuda` true for tensors of the NPU and switches `torch.jit.script` off; and a compute
capability is only what TORCH_NPU_DEVICE_CAPABILITY says, which torch's own `broadcast` stumbles over.
"""

from __future__ import annotations

import os

import torch

import torch_npu  # noqa: F401 - makes the device
from tests.sim.redirect import Redirect


def _place(number: int | None) -> str:
    return "npu" if number is None else f"npu:{number}"


def _capability(device: object = None) -> tuple[int, ...] | None:
    text = os.environ.get("TORCH_NPU_DEVICE_CAPABILITY")
    return tuple(int(word) for word in text.split(".")) if text else None


Redirect("npu", _place, "hccl", lambda kind, name, old, new: None).everything()
torch.cuda.get_device_capability = _capability
torch.Tensor.is_cuda = torch.Tensor.is_npu
torch.jit.script = lambda obj, *args, **kwargs: obj
