"""The feed-forward block, its inner features split over the tensor-parallel ranks."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.architecture import Activation
from megatron.model.inputs import LayerInputs
from megatron.model.setting import Setting
from megatron.mpu.layers import ColumnParallelLinear, RowParallelLinear, column_linears, local
from megatron.ops import Ops


def activate(ops: Ops, kind: Activation, up: Tensor, gate: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """What stands between the projections of a feed-forward block: [..., f] -> [..., f].

    Args:
        ops: the kernels.
        kind: the activation.
        up: result of the up-projection.
        gate: that of the second one of gated activations, else None.
        bias: still to be added to `up` (gelu only), [f] or None.
    """
    if gate is not None:
        return ops.swiglu(gate, up) if kind == "swiglu" else ops.geglu(gate, up)
    if kind in ("gelu", "gelu_tanh"):
        return ops.bias_gelu(up, bias, "tanh" if kind == "gelu_tanh" else "none")
    return ops.squared_relu(up) if kind == "squared_relu" else ops.relu(up)


class MLP(nn.Module):
    """Up-projection, activation, down-projection; gated activations have a second up-projection.

    Args:
        setting: of the model.
        ffn_hidden_size: inner features f; None = the architecture's.
    """

    def __init__(self, setting: Setting, *, ffn_hidden_size: int | None = None) -> None:
        super().__init__()
        arch = setting.arch
        self._ops, self._activation = setting.ops, arch.activation
        bias, shared, inner = arch.linear_bias, setting.linear(), ffn_hidden_size or arch.ffn_hidden_size
        self.gate = None
        if arch.gated:
            self.gate = ColumnParallelLinear(arch.hidden_size, inner, bias=bias, **shared)
        self.up = ColumnParallelLinear(arch.hidden_size, inner, bias=bias, **shared)
        self.down = RowParallelLinear(inner, arch.hidden_size, bias=bias, ops=setting.ops, **shared)

    def forward(self, x: Tensor, _: LayerInputs) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (or [s/t, b, h]) -> the same, and the output bias [h] (or None), not yet added.

        The side inputs, which experts need, are not looked at.
        """
        return self.down(self._inner(x))

    def _inner(self, x: Tensor) -> Tensor:
        """[s, b, h] or [s/t, b, h] -> activations [s, b, f/t]."""
        if self.gate is not None:
            gate, up = column_linears(x, (self.gate, self.up))
            return activate(self._ops, self._activation, up, gate)
        if self._activation in ("gelu", "gelu_tanh"):
            (up,) = column_linears(x, (self.up,), skip_bias=True)
            bias = None if self.up.bias is None else local(self.up.bias)
            return activate(self._ops, self._activation, up, None, bias)
        return activate(self._ops, self._activation, self.up(x), None)
