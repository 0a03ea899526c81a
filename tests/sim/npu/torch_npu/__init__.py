"""SIMULATION of torch_npu for tests: the real package's names, signatures and argument rules over plain maths.

Not Huawei's software. Importing it gives torch a simulated device "npu" and a collective backend "hccl".
"""

from __future__ import annotations

import torch

from tests.sim import runtime
from torch_npu import _communication, _operators, npu

__version__ = "2.13.0+simulation"

runtime.register("npu", npu)
_operators.register()
# torch_npu sums and then divides for AVG, and sums uint8 as int32; HCCL reduces no float64 (before the A5 chips).
_communicators = runtime.register_collectives("npu", "hccl", averages=True, not_reduced=frozenset({"Double"}))
_communication.register(_communicators)
torch.Tensor.is_npu = property(lambda tensor: tensor.device.type == "npu")

npu_fusion_attention = _operators.OPERATORS.function("npu_fusion_attention")
npu_fusion_attention_v2 = _operators.OPERATORS.function("npu_fusion_attention_v2")
npu_mm_all_reduce_base = _operators.OPERATORS.function("npu_mm_all_reduce_base")
npu_rms_norm = _operators.OPERATORS.function("npu_rms_norm")
npu_rotary_mul = _operators.OPERATORS.function("npu_rotary_mul")
npu_scaled_masked_softmax = _operators.OPERATORS.function("npu_scaled_masked_softmax")
npu_swiglu = _operators.OPERATORS.function("npu_swiglu")
