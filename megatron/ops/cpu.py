"""Implementations for this device."""

from __future__ import annotations

from megatron.ops.registry import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = ()
