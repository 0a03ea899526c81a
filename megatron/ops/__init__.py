"""Operations with a plain-torch definition and faster implementations per device, chosen once per run."""

from __future__ import annotations

from megatron.ops.block_rules import BlockRules
from megatron.ops.registry import (
    OPERATIONS,
    ClipFunction,
    Implementation,
    Ops,
    UnavailableOpError,
    build_table,
    implementations,
    implements,
    reference_ops,
)

__all__ = [
    "OPERATIONS",
    "BlockRules",
    "ClipFunction",
    "Implementation",
    "Ops",
    "UnavailableOpError",
    "build_table",
    "implementations",
    "implements",
    "reference_ops",
]
