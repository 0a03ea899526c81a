"""Which layers of the model compute with 8-bit numbers."""

from __future__ import annotations

from torch import nn

from megatron.mpu.eight_bit import EightBitLinear, EightBitScaling
from megatron.mpu.layers import ColumnParallelLinear, RowParallelLinear
from megatron.ops import Ops, UnavailableOpError
from megatron.ops.float8 import SplitProduct


def use_eight_bit(model: nn.Module, scaling: EightBitScaling, ops: Ops) -> None:
    """Let the linear layers of the transformer layers compute with 8-bit numbers; embedding and head do not.

    Args:
        model: a model or stage with logical names, its weights plain tensors of this rank, also on the meta device.
        scaling: takes on the layers.
        ops: makes the products.

    Raises:
        UnavailableOpError: the device has no such products, or a layer has features of a number that they cannot take,
            or it leaves gradients of weights for later where they come with those of inputs.
    """
    for name, module in model.named_modules():
        if name.startswith("layers.") and isinstance(module, ColumnParallelLinear | RowParallelLinear):
            features_out, features_in = module.weight.shape
            try:
                product = ops.make_linear(features_in, features_out, scaling.formats)
            except ValueError as error:
                raise UnavailableOpError(str(error)) from error
            if module.deferred is not None and not isinstance(product, SplitProduct):
                raise UnavailableOpError(
                    "--pipeline-schedule: the 8-bit products of this device give the gradients of inputs and weights "
                    "at once; choose one that does not part them, such as 1f1b"
                )
            module.eight_bit = EightBitLinear(product, scaling, scaling.add(name))
