"""SIMULATION of transformer_engine.pytorch; signatures are compared with ../../operators.json, the real ones."""

from transformer_engine.pytorch import constants, ops
from transformer_engine.pytorch.tensor import (
    Float8Quantizer,
    Float8TensorStorage,
    prepare_for_saving,
    restore_from_saved,
)

__all__ = [
    "Float8Quantizer",
    "Float8TensorStorage",
    "constants",
    "ops",
    "prepare_for_saving",
    "restore_from_saved",
]
