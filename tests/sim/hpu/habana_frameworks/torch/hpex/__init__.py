"""SIMULATION of habana_frameworks.torch.hpex."""

from __future__ import annotations

from habana_frameworks.torch.hpex import kernels, normalization, optimizers

__all__ = ["kernels", "normalization", "optimizers"]
