"""What can be wrong with a checkpoint. All are ValueErrors: the message says what to change."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; the ones before it are untouched."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint is incomplete or its files are not what was written; the message names the file."""


class CheckpointMismatch(CheckpointError):
    """A good checkpoint that is not what this run asks for: other names, shapes, vocabulary or payload."""
