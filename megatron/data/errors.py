"""The error of the data path."""

from __future__ import annotations


class DataError(ValueError):
    """A data file or a data setting cannot be used; the message names it and says what to do."""
