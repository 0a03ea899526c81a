"""SIMULATION of `torch_npu.npu`, which torch knows as `torch.npu`."""

from __future__ import annotations

from tests.sim import runtime

globals().update(runtime.device_functions("npu", "Ascend910B1 (simulated)"))
