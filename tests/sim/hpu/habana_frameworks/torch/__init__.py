"""SIMULATION of habana_frameworks.torch. Importing it gives torch a device "hpu" and a collective backend "hccl"."""

from __future__ import annotations

import torch

from habana_frameworks.torch import core, hpex, hpu
from habana_frameworks.torch._operators import register
from habana_frameworks.torch.distributed import hccl

register()
torch.Tensor.is_hpu = property(lambda tensor: tensor.device.type == "hpu")

__all__ = ["core", "hccl", "hpex", "hpu"]
