"""Which collectives a piece of code starts, seen from one rank of a fake world."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allgather_into_tensor_coalesced_": "all-gather",
    "send": "send",
    "alltoall_base_": "all-to-all",
}
Call = tuple[str, int, int]
"""Operation, bytes of the whole tensor, ranks of the group."""


class Collectives(TorchDispatchMode):
    """Counts collectives while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.__name__.split(".")[0]
            if name in _NAMES:
                tensors = [a for a in _flat(args) if isinstance(a, Tensor)]
                group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
                size = max(t.numel() * t.element_size() for t in tensors)
                self.calls[_NAMES[name], size, group.size()] += 1
            elif name != "recv_":  # somebody else's send
                self.calls[name, 0, 0] += 1
        return function(*args, **(kwargs or {}))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]
