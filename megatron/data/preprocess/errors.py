"""Errors of preprocessing that a user can act on."""

from __future__ import annotations


class PreprocessError(ValueError):
    """The corpus cannot be turned into a dataset as asked."""


class WorkerError(RuntimeError):
    """A worker process failed or ended before its work was done."""
