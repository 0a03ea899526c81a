"""A rank's own part of a tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, differentiable: a DTensor's local tensor, any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
