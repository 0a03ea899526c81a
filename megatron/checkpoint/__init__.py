"""Checkpoints: one format for every layout, written so that a kill at any byte loses nothing.

`save` and `load` for tensors of any layout; docs/checkpoints.md describes the format and what is guaranteed.
"""

from megatron.checkpoint.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint, SaveError
from megatron.checkpoint.folder import holds_checkpoint, iteration_of_tag, latest, list_checkpoints
from megatron.checkpoint.load import Loaded, load, read_record
from megatron.checkpoint.optimizer import make_state, optimizer_tensors
from megatron.checkpoint.parts import Parts, Place, Stored
from megatron.checkpoint.publish import check_writable
from megatron.checkpoint.ranks import on_first_rank
from megatron.checkpoint.save import TrainingState, save
from megatron.checkpoint.saver import WRITER, Saver, SaveSettings

__all__ = [
    "CheckpointError",
    "CheckpointMismatch",
    "CorruptCheckpoint",
    "Loaded",
    "Parts",
    "Place",
    "SaveError",
    "Stored",
    "SaveSettings",
    "WRITER",
    "Saver",
    "TrainingState",
    "check_writable",
    "holds_checkpoint",
    "iteration_of_tag",
    "latest",
    "list_checkpoints",
    "load",
    "make_state",
    "on_first_rank",
    "optimizer_tensors",
    "read_record",
    "save",
]
