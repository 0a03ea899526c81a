"""RMSNorm and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.model.setting import Setting
from megatron.mpu.layers import replicated


class Norm(nn.Module):
    """The architecture's normalisation over the last dimension, with a replicated weight.

    With `norm_1p` the weight is stored minus one, so that weight decay pulls towards the identity.

    Args:
        size: length of the last dimension.
        setting: of the model.
        bias: a LayerNorm gets a bias; RMSNorm never has one.
        partial_grad: each tensor-parallel rank normalises only a part of the tokens or heads.
    """

    def __init__(self, size: int, setting: Setting, *, bias: bool = True, partial_grad: bool) -> None:
        super().__init__()
        arch, dtype, device = setting.arch, setting.dtype, setting.device
        self._kind, self._epsilon, self._one_plus = arch.norm, arch.norm_epsilon, arch.norm_1p
        self._ops, self._group, self._partial_grad = setting.ops, setting.groups.tp, partial_grad
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.bias = (
            nn.Parameter(torch.empty(size, dtype=dtype, device=device)) if bias and arch.norm == "layernorm" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] in any floating dtype -> [..., h] in the dtype of the weight (float32 residuals end here)."""
        weight = replicated(self.weight, self._group, partial_grad=self._partial_grad)
        scale = weight + 1 if self._one_plus else weight
        if self._kind == "rmsnorm":
            return self._ops.rms_norm(x, scale, self._epsilon).to(weight.dtype)
        bias = None if self.bias is None else replicated(self.bias, self._group, partial_grad=self._partial_grad)
        return self._ops.layer_norm(x, scale, bias, self._epsilon).to(weight.dtype)
