"""The feed-forward block, its inner features split over the tensor-parallel ranks."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.model.setting import Setting
from megatron.mpu.layers import ColumnParallelLinear, RowParallelLinear, column_linears, local


class MLP(nn.Module):
    """Up-projection, activation, down-projection; gated activations have a second up-projection.

    Args:
        setting: of the model.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        arch = setting.arch
        self._ops, self._activation = setting.ops, arch.activation
        bias, shared = arch.linear_bias, setting.linear()
        self.gate = None
        if arch.gated:
            self.gate = ColumnParallelLinear(arch.hidden_size, arch.ffn_hidden_size, bias=bias, **shared)
        self.up = ColumnParallelLinear(arch.hidden_size, arch.ffn_hidden_size, bias=bias, **shared)
        self.down = RowParallelLinear(arch.ffn_hidden_size, arch.hidden_size, bias=bias, **shared)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (or [s/t, b, h]) -> the same, and the output bias [h] (or None), not yet added."""
        return self.down(self._inner(x))

    def _inner(self, x: Tensor) -> Tensor:
        """[s, b, h] or [s/t, b, h] -> activations [s, b, f/t]."""
        if self.gate is not None:
            gate, up = column_linears(x, (self.gate, self.up))
            return self._ops.swiglu(gate, up) if self._activation == "swiglu" else self._ops.geglu(gate, up)
        if self._activation in ("gelu", "gelu_tanh"):
            (up,) = column_linears(x, (self.up,), skip_bias=True)
            bias = None if self.up.bias is None else local(self.up.bias)
            return self._ops.bias_gelu(up, bias, "tanh" if self._activation == "gelu_tanh" else "none")
        activation = self._ops.squared_relu if self._activation == "squared_relu" else self._ops.relu
        return activation(self.up(x))
