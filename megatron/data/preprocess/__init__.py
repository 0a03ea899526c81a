"""Preprocessing: text files in, .bin/.idx datasets out."""

from __future__ import annotations

from megatron.data.preprocess.encode import EncodePlan
from megatron.data.preprocess.pool import WorkerError
from megatron.data.preprocess.run import PreprocessSettings, Summary, preprocess

__all__ = ["EncodePlan", "PreprocessSettings", "Summary", "WorkerError", "preprocess"]
