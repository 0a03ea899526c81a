"""The simulated operators that compute and communicate at once, and the names by which they know communicators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Backend

from tests.sim.runtime import Communicator
from torch_npu import _check
from torch_npu._operators import OPERATORS

_NOT_SIMULATED = (
    *("antiquant_scale", "antiquant_offset", "x3", "dequant_scale", "pertoken_scale", "comm_quant_scale_1"),
    *("comm_quant_scale_2", "group_sizes", "y_dtype", "x1_dtype", "x2_dtype", "comm_mode", "bias"),
)


def register(communicators: Mapping[str, Communicator]) -> None:
    """Define the operator and the method of HCCL's backend that gives the name of a communicator.

    Args:
        communicators: by name; those of this process.
    """

    def get_hccl_comm_name(backend: Backend, rankid: int) -> str:
        _check.require(rankid == dist.get_rank(), f"rankid {rankid} is not this process's global rank")
        return next(name for name, known in communicators.items() if known.backend is backend)

    def mm_all_reduce_base(*args: Any, **kwargs: Any) -> Tensor:
        o = OPERATORS.bind("npu_mm_all_reduce_base", args, kwargs)
        for name in _NOT_SIMULATED:
            _check.require(o[name] is None, f"the simulation has no {name}")
        _check.require(o["reduce_op"] == "sum" and o["comm_turn"] == 0, "only sums, and comm_turn 0")
        _check.require(o["hcom"] in communicators, f"there is no communicator {o['hcom']!r}")
        x1, x2, group = o["x1"], o["x2"], communicators[o["hcom"]].host
        _check.matmul_all_reduce(x1, x2, group.size())
        product = (x1.float() @ x2.float()).to(x1.dtype)
        group.allreduce([product]).wait()
        return product

    Backend.get_hccl_comm_name = get_hccl_comm_name
    OPERATORS.define("npu_mm_all_reduce_base", mm_all_reduce_base)
